// Weights of 8 and 4 bits times rows of `a`, dequantised on their way through the registers.
//
//   8 bits  32 columns  --convert-->  32 levels times 32 numbers of `a`;  the row's scale comes last of all
//   4 bits  128 columns, 32 words of four levels, or 16 of eight:
//
//       word i of the weight   | 4i | 4i+1 | 4i+2 | 4i+3 |
//       word >> 0, 4, 8, 12, its last four bits looked up in a table:  32 levels each, of columns 4i + j
//
//     `a` is laid out to meet them. Lane l of a sum holds columns 8l ... 8l + 7, which lie in one group: a vector of
//     scales, spread over the lanes, is multiplied onto the step's sum on its way into the row's.
//
// A level is exact in bf16 and in fp32; products and sums are those of dots.h. 4 bits with one scale a row leave it for
// last, too.
#pragma once

#include "cpu/dots.h"
#include "slicegpt_fast.h"

namespace sgf {
namespace {

constexpr int64_t kWidestStep = 128;  // of all below, in columns

// How many of a row's K columns share a scale, where it has `count` of them.
constexpr int64_t group_of(int64_t count, int64_t K) {
  int64_t group = count == 1 ? K : 32;
  while (ceil_div(K, group) > count) group *= 2;
  return group;
}

// What levels become: pairs of bf16 where there is a dot product for them and `a` is bf16, else fp32.
template <class T>
struct Dequantized {
  using Numbers = Operand<float>;
};

#if defined(__AVX512BF16__)
template <>
struct Dequantized<BFloat16> {
  using Numbers = Operand<BFloat16>;
};
#endif

// Zeros behind the first `count` bytes.
template <class Vector>
inline Vector load_bytes(const uint8_t* from, int64_t count) {
#if defined(__AVX512F__)
  const uint64_t wanted = count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
  const __m512i bytes = _mm512_maskz_loadu_epi8(wanted, from);
  Vector x;
  std::memcpy(&x, &bytes, sizeof x);
  return x;
#else
  Vector x = {};
  std::memcpy(&x, from, static_cast<std::size_t>(count));
  return x;
#endif
}

template <class Vector>
inline Vector load_bytes(const uint8_t* from) {
  Vector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

using Levels = int8_t __attribute__((vector_size(kLanes)));

inline Floats widen(Levels levels) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, bit_cast<__m128i>(levels)));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bit_cast<int64_t>(levels))));
#else
  return __builtin_convertvector(levels, Floats);
#endif
}

// kStep columns of a row of 8 bits, and its kParts times Numbers::kStep levels.
template <class Numbers>
struct EightBits;

template <>
struct EightBits<Operand<float>> {
  using Numbers = Operand<float>;
  static constexpr int kParts = 1, kStep = kLanes, kInByte = 1;
  Levels bits;

  static EightBits of(const uint8_t* from) { return {load_bytes<Levels>(from)}; }
  static EightBits of(const uint8_t* from, int64_t columns) { return {load_bytes<Levels>(from, columns)}; }
  Numbers part(int) const { return {widen(bits)}; }
};

// kStep columns of a row of 4 bits.
template <class Numbers>
struct FourBits;

template <>
struct FourBits<Operand<float>> {
  using Numbers = Operand<float>;
  static constexpr int kParts = 8, kStep = 8 * kLanes, kInByte = 2;
  Words bits;

  static FourBits of(const uint8_t* from) { return {load_bytes<Words>(from)}; }
  static FourBits of(const uint8_t* from, int64_t columns) { return {load_bytes<Words>(from, ceil_div(columns, 2))}; }
  Numbers part(int j) const {
#if defined(__AVX512F__)
    const Floats table = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    return {_mm512_maskz_permutexvar_ps(0xffff, bit_cast<__m512i>(bits >> 4 * j), table)};
#else
    using Integers = int32_t __attribute__((vector_size(4 * kLanes)));
    return {__builtin_convertvector(bit_cast<Integers>(bits >> 4 * j & 15), Floats) - 8};
#endif
  }
};

#if defined(__AVX512BF16__)
template <>
struct EightBits<Operand<BFloat16>> {
  using Numbers = Operand<BFloat16>;
  static constexpr int kParts = 1, kStep = Numbers::kStep, kInByte = 1;
  Levels low, high;

  static EightBits of(const uint8_t* from) { return {load_bytes<Levels>(from), load_bytes<Levels>(from + kLanes)}; }
  static EightBits of(const uint8_t* from, int64_t columns) {
    const __m256i bits = _mm256_maskz_loadu_epi8((1u << columns) - 1, from);
    return {bit_cast<Levels>(_mm256_castsi256_si128(bits)), bit_cast<Levels>(_mm256_extracti128_si256(bits, 1))};
  }
  Numbers part(int) const { return {_mm512_maskz_cvtne2ps_pbh(0xffffffff, widen(high), widen(low))}; }
};

template <>
struct FourBits<Operand<BFloat16>> {
  using Numbers = Operand<BFloat16>;
  static constexpr int kParts = 4, kStep = 4 * Numbers::kStep, kInByte = 2;
  using Pairwise = uint16_t __attribute__((vector_size(4 * kLanes)));
  Pairwise bits;

  static FourBits of(const uint8_t* from) { return {load_bytes<Pairwise>(from)}; }
  static FourBits of(const uint8_t* from, int64_t columns) {
    return {load_bytes<Pairwise>(from, ceil_div(columns, 2))};
  }
  Numbers part(int j) const {
    // -8 to 7 in bf16, twice: a lookup takes five bits, the last of which is another column's.
    constexpr Pairwise table = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0,      0x3f80, 0x4000,
                                0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
                                0xc000, 0xbf80, 0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
    const __m512i found =
        _mm512_maskz_permutexvar_epi16(0xffffffff, bit_cast<__m512i>(bits >> 4 * j), bit_cast<__m512i>(table));
    return {bit_cast<Pairs>(found)};
  }
};
#endif

// Rows of a quantised weight, as dot_rows takes them; `grouped` where a row has a scale for each `group` columns.
template <class T, template <class> class Bits, bool grouped>
struct Quantized {
  using Step = Bits<typename Dequantized<T>::Numbers>;
  const uint8_t* levels;
  int64_t levels_stride;  // bytes
  const Float16* scales;
  int64_t scales_stride, group;

  const uint8_t* row(int64_t r) const { return levels + r * levels_stride; }
  const Float16* scales_of(int64_t r) const { return scales + r * scales_stride; }
  Quantized operator+(int64_t rows) const { return {row(rows), levels_stride, scales_of(rows), scales_stride, group}; }
};

// The first `count` scales, each on the lanes whose `place` says so; only AVX-512 has vectors for more than two.
inline Floats spread(const Float16* scales, int64_t count, Words place) {
#if defined(__AVX512F__)
  return _mm512_maskz_permutexvar_ps(0xffff, bit_cast<__m512i>(place), load(scales, count));
#else
  const Floats x = widen(Shorts{scales[0].bits, scales[count - 1].bits}, Float16{});
  return bit_cast<Floats>(select(place == 0, bit_cast<Words>(splat(x[0])), bit_cast<Words>(splat(x[1]))));
#endif
}

// Lane l: l / lanes.
template <int... lane>
inline Words places(uint32_t lanes, std::integer_sequence<int, lane...>) {
  return Words{(lane / lanes)...};
}

// sums[m, r] += a[m] . w[r] for `rows` rows of a and `columns` rows of w.
template <int rows, int columns, class Kept, class T, template <class> class Bits, bool grouped>
inline void dot_tile(const Kept* a, int64_t a_stride, Quantized<T, Bits, grouped> w, int64_t, int64_t K, float* sums,
                     int64_t sums_stride) {
  using Step = typename Quantized<T, Bits, grouped>::Step;
  using Numbers = typename Step::Numbers;
  const int64_t group = grouped ? w.group : Step::kStep;
  const int64_t groups = group < Step::kStep ? Step::kStep / group : 1;
  const Words place = places(static_cast<uint32_t>(kLanes / groups), std::make_integer_sequence<int, kLanes>());
  const int shift = __builtin_ctzll(static_cast<uint64_t>(group));
  Floats total[rows][columns] = {};
  const auto add = [&](int64_t k, int64_t scales, auto... count) {
#pragma GCC unroll 8
    for (int r = 0; r < columns; ++r) {
      const Step x = Step::of(w.row(r) + k / Step::kInByte, count...);
      prefetch(w.row(r + columns) + k / Step::kInByte);
      Floats partial[rows];
#pragma GCC unroll 8
      for (int m = 0; m < rows; ++m) partial[m] = grouped ? Floats{} : total[m][r];
#pragma GCC unroll 8
      for (int j = 0; j < Step::kParts; ++j) {
        const Numbers numbers = x.part(j);
#pragma GCC unroll 8
        for (int m = 0; m < rows; ++m) {
          partial[m] = numbers.times(Numbers::of_kept(a + m * a_stride + k + j * Numbers::kStep), partial[m]);
        }
      }
      if constexpr (grouped) {
        const Floats scale = spread(w.scales_of(r) + (k >> shift), scales, place);
#pragma GCC unroll 8
        for (int m = 0; m < rows; ++m) total[m][r] += partial[m] * scale;
      } else {
#pragma GCC unroll 8
        for (int m = 0; m < rows; ++m) total[m][r] = partial[m];
      }
    }
  };
  int64_t k = 0;
  for (; k + Step::kStep <= K; k += Step::kStep) add(k, groups);
  if (k < K) add(k, ceil_div(K - k, group), K - k);
  float scale[ceil_div(columns, kLanes) * kLanes];
  for (int first = 0; first < columns; first += kLanes) {
    Shorts bits = {};
    for (int r = first; r < columns && r < first + kLanes; ++r) bits[r - first] = w.scales_of(r)->bits;
    store(scale + first, grouped ? splat(1.0f) : widen(bits, Float16{}));
  }
#pragma GCC unroll 8
  for (int m = 0; m < rows; ++m) {  // unrolled, or the sums would not stay in registers
    float* const to = sums + m * sums_stride;
    if constexpr (columns > 1 && columns <= kLanes) {
      Floats row[columns];
#pragma GCC unroll 8
      for (int r = 0; r < columns; ++r) row[r] = total[m][r];
      store(to, load(to, columns) + sums_of<columns>(row) * load(scale), columns);
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < columns; ++r) to[r] += sum(total[m][r]) * scale[r];
    }
  }
}

// `size` numbers, of which the first `count` are read, in fp32 or as they are.
template <class T>
inline void copy_numbers(const T* from, int64_t count, float* to, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes) store(to + i, load(from + i, count - i));
}

inline void copy_numbers(const BFloat16* from, int64_t count, BFloat16* to, int64_t size) {
  std::memset(to, 0, static_cast<std::size_t>(size) * sizeof(BFloat16));
  std::memcpy(to, from, static_cast<std::size_t>(count < size ? count : size) * sizeof(BFloat16));
}

// K numbers in the form that products with a quantised weight take, with zeros up to a whole step.
template <class Step, class T, class Kept>
inline void keep_for(const T* from, int64_t K, Kept* to) {
  constexpr int kPart = Step::Numbers::kStep;
  if constexpr (Step::kParts == 1) return copy_numbers(from, K, to, ceil_div(K, kPart) * kPart);
  for (int64_t k = 0; k < K; k += Step::kStep, to += Step::kStep) {
    Kept numbers[Step::kStep];
    copy_numbers(from + k, K - k, numbers, Step::kStep);
    for (int j = 0; j < Step::kParts; ++j) {
      for (int i = 0; i < kPart; ++i) to[j * kPart + i] = numbers[i * Step::kParts + j];
    }
  }
}

// Lane l: number l of the 4-bit numbers in `bits`.
template <int... lane>
inline Words halves(uint64_t bits, std::integer_sequence<int, lane...>) {
  const Words low = splat(static_cast<uint32_t>(bits)), high = splat(static_cast<uint32_t>(bits >> 32));
  return select(Words{lane...} < 8, low, high) >> Words{(4 * (lane % 8))...} & 15;
}

// The first `count` levels of kLanes.
inline Floats levels(const uint8_t* from, int64_t count, bool four) {
  if (!four) return widen(count >= kLanes ? load_bytes<Levels>(from) : load_bytes<Levels>(from, count));
  uint64_t bits = 0;
  std::memcpy(&bits, from, static_cast<std::size_t>(count >= kLanes ? kLanes / 2 : ceil_div(count, 2)));
  return __builtin_convertvector(halves(bits, std::make_integer_sequence<int, kLanes>()), Floats) - 8;
}

// Rows begin ... end of y, the weight that levels and scales stand for.
template <class T>
inline void dequantize_rows(const sgf_matrix& weight, const sgf_matrix& scales, const sgf_matrix& y, int64_t begin,
                            int64_t end, bool four) {
  const int64_t K = y.columns, group = group_of(scales.columns, K);
  for (int64_t r = begin; r < end; ++r) {
    const uint8_t* from = static_cast<const uint8_t*>(weight.data) + r * weight.row_stride;
    const Float16* scale = static_cast<const Float16*>(scales.data) + r * scales.row_stride;
    T* const to = static_cast<T*>(y.data) + r * K;
    for (int64_t k = 0; k < K; ++scale) {
      const Floats factor = splat(widen(Shorts{scale->bits}, Float16{})[0]);
      for (const int64_t next = k + group < K ? k + group : K; k < next; k += kLanes) {
        store(to + k, levels(from + (four ? k / 2 : k), K - k, four) * factor, K - k);
      }
    }
  }
}

}  // namespace
}  // namespace sgf
