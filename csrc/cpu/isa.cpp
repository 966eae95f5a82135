// Which instruction sets the CPU kernels may use on this machine.
//
// Kernels come in levels, weakest first; a level needs its own features and those of every level below it. setup.py
// compiles kernel files named *_<level>.cpp with the matching flags (CPU_FLAGS there).
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <string>

#include "slicegpt_fast.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace {

struct Feature {
  uint32_t bit;
  const char* name;  // as in /proc/cpuinfo
};

struct Level {
  const char* name;
  uint32_t needs;  // feature bits beyond those of the level below
};

#if defined(__x86_64__)

enum : uint32_t {
  kAvx2 = 1u << 0,
  kFma = 1u << 1,
  kF16c = 1u << 2,
  kAvx512f = 1u << 3,
  kAvx512bw = 1u << 4,
  kAvx512dq = 1u << 5,
  kAvx512vl = 1u << 6,
  kAvx512bf16 = 1u << 7,
};

constexpr Feature kFeatures[] = {
    {kAvx2, "avx2"},         {kFma, "fma"},           {kF16c, "f16c"},         {kAvx512f, "avx512f"},
    {kAvx512bw, "avx512bw"}, {kAvx512dq, "avx512dq"}, {kAvx512vl, "avx512vl"}, {kAvx512bf16, "avx512_bf16"},
};

constexpr Level kLevels[] = {
    {"baseline", 0},  // SSE2, which every x86-64 has
    {"avx2", kAvx2 | kFma | kF16c},
    {"avx512", kAvx512f | kAvx512bw | kAvx512dq | kAvx512vl},
    {"avx512bf16", kAvx512bf16},
};

struct CpuidResult {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;  // all zero where the CPU does not know the leaf
};

CpuidResult cpuid(uint32_t leaf, uint32_t subleaf) {
  CpuidResult r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

// XCR0: which register files the operating system saves on a context switch. Written in assembly because the intrinsic
// would need this file compiled with -mxsave.
uint64_t enabled_register_state() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

uint32_t detect_features() {
  const CpuidResult basic = cpuid(1, 0), extended = cpuid(7, 0), extended1 = cpuid(7, 1);
  const auto bit = [](uint32_t reg, int index) { return (reg >> index & 1) != 0; };

  const uint64_t state = bit(basic.ecx, 27) /* OSXSAVE */ ? enabled_register_state() : 0;
  const bool ymm = (state & 0x06) == 0x06;         // XMM, upper YMM
  const bool zmm = ymm && (state & 0xe0) == 0xe0;  // mask registers, upper ZMM, ZMM16-31

  uint32_t found = 0;
  const auto add = [&found](bool present, uint32_t feature) { found |= present ? feature : 0; };
  add(ymm && bit(extended.ebx, 5), kAvx2);
  add(ymm && bit(basic.ecx, 12), kFma);
  add(ymm && bit(basic.ecx, 29), kF16c);
  add(zmm && bit(extended.ebx, 16), kAvx512f);
  add(zmm && bit(extended.ebx, 30), kAvx512bw);
  add(zmm && bit(extended.ebx, 17), kAvx512dq);
  add(zmm && bit(extended.ebx, 31), kAvx512vl);
  add(zmm && bit(extended1.eax, 5), kAvx512bf16);
  return found;
}

#elif defined(__aarch64__)

enum : uint32_t { kBf16 = 1u << 0, kSve = 1u << 1, kSvebf16 = 1u << 2 };

constexpr Feature kFeatures[] = {{kBf16, "bf16"}, {kSve, "sve"}, {kSvebf16, "svebf16"}};

constexpr Level kLevels[] = {
    {"baseline", 0},  // NEON, which every aarch64 has
};

// The kernel's bits for the auxiliary vector, spelled out because older system headers lack the newer ones.
uint32_t detect_features() {
  constexpr unsigned long kHwcapSve = 1ul << 22, kHwcap2Svebf16 = 1ul << 12, kHwcap2Bf16 = 1ul << 14;
  const unsigned long hwcap = getauxval(AT_HWCAP), hwcap2 = getauxval(AT_HWCAP2);
  return (hwcap2 & kHwcap2Bf16 ? kBf16 : 0) | (hwcap & kHwcapSve ? kSve : 0) | (hwcap2 & kHwcap2Svebf16 ? kSvebf16 : 0);
}

#else
#error "slicegpt-fast compiles for x86-64 and aarch64"
#endif

uint32_t features() {
  static const uint32_t found = detect_features();
  return found;
}

int choose_level() {
  int cap = static_cast<int>(std::size(kLevels)) - 1;
  const char* wanted = std::getenv("SLICEGPT_FAST_CPU_ISA");
  if (wanted != nullptr && *wanted != '\0') {
    while (cap >= 0 && std::strcmp(kLevels[cap].name, wanted) != 0) --cap;
    if (cap < 0) return SGF_UNKNOWN_CPU_ISA;
  }
  int level = 0;
  while (level < cap && (features() & kLevels[level + 1].needs) == kLevels[level + 1].needs) ++level;
  return level;
}

}  // namespace

const char* sgf_cpu_features(void) {
  static const std::string names = [] {
    std::string joined;
    for (const Feature& feature : kFeatures) {
      if ((features() & feature.bit) == 0) continue;
      if (!joined.empty()) joined += ' ';
      joined += feature.name;
    }
    return joined;
  }();
  return names.c_str();
}

int sgf_cpu_isa(void) {
  static const int level = choose_level();
  return level;
}

const char* sgf_cpu_isa_name(int level) { return kLevels[level].name; }

int sgf_cpu_isa_count(void) { return static_cast<int>(std::size(kLevels)); }
