// Vectors of fp32, and the element types that are read into and written from them.
//
// A kernel is written once, in a header, on top of this file; the header is included by <kernel>.cpp, <kernel>_avx2.cpp
// and so on, each compiled for its own instruction set. Everything here, and everything in such a header, stands in an
// unnamed namespace: a function that two of these files shared would be linked once, perhaps with the stronger
// instructions. For the same reason such headers use no templates and inline functions of the standard library.
//
// Arithmetic is that of the compiler's vector extensions: +, *, <, ?: work lane by lane, a * b + c is one instruction
// where the machine has one. Loads and stores need no alignment, and touch exactly the elements that they are told to.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sgf {
namespace {

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // SSE2, NEON
#endif

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));
using Shorts = uint16_t __attribute__((vector_size(2 * kLanes)));

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline Floats splat(float x) { return x - Floats{}; }
inline Words splat(uint32_t x) { return x - Words{}; }

// where ? a : b, lane by lane; `where` is a comparison's result.
template <class Where>
inline Words select(Where where, Words a, Words b) {
  return where ? a : b;
}

// Conversions between kLanes elements' bits and fp32, exact or rounded to nearest even.

inline Words widen(Shorts bits) {
#if defined(__AVX512F__)
  return bit_cast<Words>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(bits)));
#elif defined(__AVX2__)
  return bit_cast<Words>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(bits)));
#else
  return __builtin_convertvector(bits, Words);
#endif
}

inline Floats widen(Shorts bits, BFloat16) { return bit_cast<Floats>(widen(bits) << 16); }

inline Shorts narrow(Floats x, BFloat16) {
  const Words bits = bit_cast<Words>(x);
  const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return __builtin_convertvector(select(x == x, rounded, bits >> 16 | 0x40), Shorts);
}

#if defined(__AVX512F__)
// Masked by all ones, because GCC 12 warns of the unmasked ones' undefined operand.
inline Floats widen(Shorts bits, Float16) { return _mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(bits)); }
inline Shorts narrow(Floats x, Float16) {
  return bit_cast<Shorts>(_mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
inline Floats widen(Shorts bits, Float16) { return _mm256_cvtph_ps(bit_cast<__m128i>(bits)); }
inline Shorts narrow(Floats x, Float16) { return bit_cast<Shorts>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
#else
inline Floats widen(Shorts bits, Float16) {
  const Words wide = widen(bits), magnitude = wide & 0x7fff;
  const Words finite = bit_cast<Words>(bit_cast<Floats>(magnitude << 13) * 0x1p112f);  // the other exponent bias
  return bit_cast<Floats>(select(magnitude < 0x7c00, finite, magnitude << 13 | 0x7f800000) | (wide & 0x8000) << 16);
}

inline Shorts narrow(Floats x, Float16) {
  const Words bits = bit_cast<Words>(x), magnitude = bits & 0x7fffffff;
  const Words normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const Words subnormal = bit_cast<Words>(bit_cast<Floats>(magnitude) + 0.5f) - 0x3f000000;  // the addition rounds
  const Words finite = select(magnitude < 0x38800000, subnormal, normal);
  const Words special = select(magnitude > 0x7f800000, splat(0x7e00u), splat(0x7c00u));
  return __builtin_convertvector(select(magnitude < 0x47800000, finite, special) | (bits >> 16 & 0x8000), Shorts);
}
#endif

// kLanes elements.

template <class T>
inline Floats load(const T* from) {
  Shorts bits;
  std::memcpy(&bits, from, sizeof bits);
  return widen(bits, T{});
}

inline Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <class T>
inline void store(T* to, Floats x) {
  const Shorts bits = narrow(x, T{});
  std::memcpy(to, &bits, sizeof bits);
}

inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

// The first `count` elements, where there are fewer than kLanes; the other lanes are read as zero and not written.

#if defined(__AVX512F__)
inline uint16_t first(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

template <class T>
inline Floats load(const T* from, int64_t count) {
  return widen(bit_cast<Shorts>(_mm256_maskz_loadu_epi16(first(count), from)), T{});
}

inline Floats load(const float* from, int64_t count) { return _mm512_maskz_loadu_ps(first(count), from); }

template <class T>
inline void store(T* to, Floats x, int64_t count) {
  _mm256_mask_storeu_epi16(to, first(count), bit_cast<__m256i>(narrow(x, T{})));
}

inline void store(float* to, Floats x, int64_t count) { _mm512_mask_storeu_ps(to, first(count), x); }
#else
template <class T>
inline Floats load(const T* from, int64_t count) {
  if (count >= kLanes) return load(from);
  T elements[kLanes] = {};
  if (count > 0) std::memcpy(elements, from, static_cast<std::size_t>(count) * sizeof(T));
  return load(elements);
}

template <class T>
inline void store(T* to, Floats x, int64_t count) {
  if (count >= kLanes) return store(to, x);
  T elements[kLanes];
  store(elements, x);
  if (count > 0) std::memcpy(to, elements, static_cast<std::size_t>(count) * sizeof(T));
}
#endif

// Lane i is that of x whose number differs from i in the bits of `flip`.
template <int flip, int... lane>
inline Floats exchange(Floats x, std::integer_sequence<int, lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, x, (lane ^ flip)...);
#else
  return __builtin_shuffle(x, Words{(lane ^ flip)...});
#endif
}

// The sum of all lanes, always in the same order: lane i and lane i + kLanes / 2, and so on.
template <int flip = kLanes / 2>
inline float sum(Floats x) {
  x += exchange<flip>(x, std::make_integer_sequence<int, kLanes>());
  if constexpr (flip > 1) {
    return sum<flip / 2>(x);
  } else {
    return x[0];
  }
}

// Lane i of a[i] + a[i ^ flip] where i has not that bit, of b's where it has.
template <int flip, int... lane>
inline Floats merge(Floats a, Floats b, std::integer_sequence<int, lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, ((lane & flip) != 0 ? lane + kLanes : lane)...) +
         __builtin_shufflevector(a, b, ((lane & flip) != 0 ? (lane ^ flip) + kLanes : lane ^ flip)...);
#else
  return __builtin_shuffle(a, b, Words{((lane & flip) != 0 ? lane + kLanes : lane)...}) +
         __builtin_shuffle(a, b, Words{((lane & flip) != 0 ? (lane ^ flip) + kLanes : lane ^ flip)...});
#endif
}

// Lanes 0, step, 2 step, ...
template <int step, int... lane>
inline Floats every(Floats x, std::integer_sequence<int, lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, x, (lane * step % kLanes)...);
#else
  return __builtin_shuffle(x, Words{(lane * step % kLanes)...});
#endif
}

// Lane r: sum(x[r]), bit for bit, for count <= kLanes vectors, a power of two. Two vectors at a time become one: where
// one adds its lanes i and i + flip, there is room for the other's.
template <int count, int flip = kLanes / 2>
inline Floats sums_of(const Floats* x) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
  if constexpr (flip == 0) {
    return x[0];
  } else if constexpr (count == 1) {
    const Floats folded = x[0] + exchange<flip>(x[0], lanes);
    return sums_of<1, flip / 2>(&folded);
  } else {
    Floats merged[count / 2];
    for (int r = 0; r < count / 2; ++r) merged[r] = merge<flip>(x[r], x[r + count / 2], lanes);
    const Floats sums = sums_of<count / 2, flip / 2>(merged);
    return flip == kLanes / 2 ? every<kLanes / count>(sums, lanes) : sums;
  }
}

#if defined(__AVX512BF16__)
// 2 kLanes bf16 numbers; lane i of an fp32 vector goes with the pair (2i, 2i + 1).
using Pairs = __m512bh;

inline Pairs load_pairs(const BFloat16* from) { return bit_cast<Pairs>(_mm512_loadu_si512(from)); }

// The first `count` < 2 kLanes numbers, then zeros.
inline Pairs load_pairs(const BFloat16* from, int64_t count) {
  return bit_cast<Pairs>(_mm512_maskz_loadu_epi16((1u << count) - 1, from));
}

// sums + a[2i] * b[2i] + a[2i + 1] * b[2i + 1]: exact products, fp32 sums; subnormal numbers count as zero.
inline Floats dot(Floats sums, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sums, a, b); }
#endif

}  // namespace
}  // namespace sgf
