// attend: the attention of a decode step, 1 to 16 new tokens over a cache of keys and values.
//
//                     cache of one key and value head [S, D]
//                     chunk 0    chunk 1    chunk 2
//   n queries [n, D] +----------+----------+-----+--+      item = (sequence, key and value head, chunk)
//   (heads that share|          |          |     |new      a thread owns items; of each it keeps n rows of
//   them, tokens)    +----------+----------+-----+--+      sum exp(s - max) V, the maximum and sum exp(s - max)
//                         |          |         |
//                         +---- in this order -+--> y [n, rank]
//
// Chunks hold 256 positions. Whoever has the chunk of a new token normalises, rotates and appends it before he reads
// the chunk. Scores are dot products with as many rows of keys at a time as in the matmuls; probabilities times values
// go eight positions at a time onto the sums, which stay in L1. No sum depends on the number of threads.
//
//     FLOPs  2 n S (D + rank) per key and value head
//     Bytes  S D (keys) + S rank (values), times 2 or 4, per sequence and key and value head
//     Floor  the bytes, as far as n is small: grouped queries read a cache once for all heads that share it. S = 4096,
//            9 heads over 3, D = 64 in bf16, two cores of a Xeon that read 22 GB/s: 143 us
//     Share  of that 0.74, from memory; at S = 512 (18 us) 40 us of 56 are the call of the op
#pragma once

#include "cpu/activation.h"
#include "cpu/dots.h"
#include "slicegpt_fast.h"

namespace sgf {

// A call of sgf_attend(), operands as there.
struct Attend {
  int dtype;
  int64_t batch, tokens, heads, groups, size, rank, start;
  sgf_matrix queries, new_keys, new_values;  // [batch tokens, heads or groups]: the first number of each head
  sgf_matrix cosine, sine;
  const void *query_norm, *key_norm;
  double eps, scale;
  sgf_matrix keys, values;  // [batch groups, positions * size]
  sgf_matrix mask;
  sgf_matrix y;
  float* shared;  // all threads' workspace
};

// Each of `parts` takes its share of the items; when all have, each its share of the rows of y.
struct AttendKernel {
  void (*share)(const Attend& call, int part, int parts, float* own);
  void (*combine)(const Attend& call, int part, int parts);
};

// That of the machine; null where SLICEGPT_FAST_CPU_ISA names no level.
const AttendKernel* attend_kernel();

// The call of slicegpt_fast.h, without its workspace.
Attend attend(sgf_matrix queries, sgf_matrix new_keys, sgf_matrix new_values, sgf_matrix cosine, sgf_matrix sine,
              sgf_matrix query_norm, sgf_matrix key_norm, sgf_matrix keys, sgf_matrix values, sgf_matrix mask,
              sgf_matrix y, int64_t batch, int64_t size, int64_t rank, int64_t start, double eps, double scale,
              int dtype);

// Workspace in floats: all threads', and each thread's own.
int64_t attend_shared_floats(const Attend& call);
int64_t attend_own_floats(const Attend& call);

#if defined(__x86_64__)
extern const AttendKernel kAttendAvx2, kAttendAvx512, kAttendAvx512Bf16;
#endif

namespace {

constexpr int64_t kChunk = 256;   // positions
constexpr int64_t kStep = 16;     // of them are fetched at a time
constexpr float kNever = -3e38f;  // the score of a position that counts nowhere

inline int64_t queries_of_group(const Attend& call) { return call.tokens * call.heads / call.groups; }
inline int64_t chunks(const Attend& call) { return ceil_div(call.start + call.tokens, kChunk); }

// Floats of one item: the sums, the maxima and the sums of exponentials of its queries.
inline int64_t item_floats(const Attend& call) { return queries_of_group(call) * (padded(call.rank) + 2); }

inline int64_t shared_floats(const Attend& call) { return call.batch * call.groups * chunks(call) * item_floats(call); }

inline int64_t own_floats(const Attend& call) {
  return queries_of_group(call) * (padded(call.size) + kChunk) + 2 * padded(call.size);
}

template <class T>
class Attention {
 public:
  explicit Attention(const Attend& call, float* own = nullptr)
      : call_(call), n_(queries_of_group(call)), chunks_(chunks(call)), sums_stride_(padded(call.rank)) {
    const auto take = [&own](int64_t count) { return (own += count) - count; };
    if (own == nullptr) return;
    kept_ = reinterpret_cast<Kept*>(take(n_ * padded(call.size)));
    scores_ = take(n_ * kChunk);
    head_ = take(padded(call.size));
    rounded_ = reinterpret_cast<T*>(take(padded(call.size)));
  }

  void share(int part, int parts) const {
    const int64_t items = call_.batch * call_.groups * chunks_;
    int64_t of = -1;  // the key and value head that the kept queries belong to
    for (int64_t item = items * part / parts; item < items * (part + 1) / parts; ++item) {
      const int64_t head = item / chunks_, sequence = head / call_.groups, group = head % call_.groups;
      const int64_t first = item % chunks_ * kChunk, end = first + kChunk < length() ? first + kChunk : length();
      if (head != of) keep_queries(sequence, group);
      of = head;
      append(sequence, group, first, end);
      score(sequence, group, first, end);
      add_values(sequence, group, first, end, sums(item));
    }
  }

  void combine(int part, int parts) const {
    const int64_t rows = call_.batch * call_.groups * n_;
    for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row) combine_row(row / n_, row % n_);
  }

 private:
  using Kept = typename Operand<T>::Kept;

  int64_t length() const { return call_.start + call_.tokens; }
  int64_t per_group() const { return call_.heads / call_.groups; }

  float* sums(int64_t item) const { return call_.shared + item * item_floats(call_); }
  float* maxima(float* sums) const { return sums + n_ * sums_stride_; }
  float* totals(float* sums) const { return maxima(sums) + n_; }

  static const T* head(const sgf_matrix& from, int64_t row, int64_t index) {
    return static_cast<const T*>(from.data) + row * from.row_stride + index * from.column_stride;
  }

  T* cached(const sgf_matrix& cache, int64_t sequence, int64_t group, int64_t position) const {
    return static_cast<T*>(cache.data) + (sequence * call_.groups + group) * cache.row_stride + position * call_.size;
  }

  // Row m of a matrix with one row for each token of the batch, or one for each token of every sequence.
  int64_t row_in(const sgf_matrix& matrix, int64_t m) const {
    return matrix.rows == call_.tokens ? m % call_.tokens : m;
  }

  // To L2: values while keys are read, and the other way round.
  static void fetch(const T* from, int64_t count) {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t i = 0; i < count; i += kLine) prefetch(from + i);
  }

  // A head of token m, normalised and rotated as the model does it, in the model's dtype.
  void rotate(const T* from, const void* norm, int64_t m, T* to) const {
    const int64_t size = call_.size;
    const float scale = norm == nullptr
                            ? 1.0f
                            : static_cast<float>(1.0 / __builtin_sqrt(sum_of_squares(from, size) / size + call_.eps));
    for (int64_t k = 0; k < size; k += kLanes) {
      const int64_t count = size - k;
      Floats x = load(from + k, count);
      if (norm != nullptr) {
        store(to + k, x * scale, count);
        x = load(to + k, count) * load(static_cast<const T*>(norm) + k, count);
      }
      store(head_ + k, x);
    }
    const int64_t half = call_.cosine.columns / 2;
    const T* const cosine = head(call_.cosine, row_in(call_.cosine, m), 0);
    const T* const sine = head(call_.sine, row_in(call_.sine, m), 0);
    for (int64_t k = 0; k < half; k += kLanes) {
      const int64_t count = half - k;
      const Floats a = load(head_ + k, count), b = load(head_ + half + k, count);
      store(head_ + k, a * load(cosine + k, count) - b * load(sine + k, count), count);
      store(head_ + half + k, b * load(cosine + half + k, count) + a * load(sine + half + k, count), count);
    }
    for (int64_t k = 0; k < size; k += kLanes) store(to + k, load(head_ + k), size - k);
  }

  void keep_queries(int64_t sequence, int64_t group) const {
    for (int64_t i = 0; i < n_; ++i) {
      const int64_t m = sequence * call_.tokens + i / per_group();
      rotate(head(call_.queries, m, group * per_group() + i % per_group()), call_.query_norm, m, rounded_);
      keep_row(rounded_, call_.size, kept_ + i * padded(call_.size));
    }
  }

  // The new tokens among the positions first ... end.
  void append(int64_t sequence, int64_t group, int64_t first, int64_t end) const {
    for (int64_t position = first > call_.start ? first : call_.start; position < end; ++position) {
      const int64_t m = sequence * call_.tokens + position - call_.start;
      rotate(head(call_.new_keys, m, group), call_.key_norm, m, cached(call_.keys, sequence, group, position));
      T* const to = cached(call_.values, sequence, group, position);
      std::memcpy(to, head(call_.new_values, m, group), static_cast<std::size_t>(call_.rank) * sizeof(T));
      std::memset(to + call_.rank, 0, static_cast<std::size_t>(call_.size - call_.rank) * sizeof(T));
    }
  }

  // The scores of the positions first ... end, and kNever up to a whole vector.
  void score(int64_t sequence, int64_t group, int64_t first, int64_t end) const {
    const int64_t count = end - first;
    for (int64_t i = 0; i < n_; ++i) {
      for (int64_t j = 0; j < count; j += kLanes) store(scores_ + i * kChunk + j, Floats{});
    }
    const T* const keys = cached(call_.keys, sequence, group, first);
    const T* const values = cached(call_.values, sequence, group, first);
    for (int64_t j = 0; j < count; j += kStep) {
      const int64_t next = j + kStep < count ? j + kStep : count;
      fetch(values + j * call_.size, (next - j) * call_.size);
      dot_rows(n_, kept_, padded(call_.size), keys, call_.size, call_.size, scores_, kChunk, j, next);
    }
    for (int64_t i = 0; i < n_; ++i) {
      float* const scores = scores_ + i * kChunk;
      for (int64_t j = 0; j < count; j += kLanes) store(scores + j, load(scores + j) * static_cast<float>(call_.scale));
      hide(sequence, i / per_group(), first, count, scores);
      for (int64_t j = count; j % kLanes != 0; ++j) scores[j] = kNever;
    }
  }

  // Sets the scores that do not count: those that the mask names, or those of later tokens.
  void hide(int64_t sequence, int64_t token, int64_t first, int64_t count, float* scores) const {
    if (call_.mask.data == nullptr) {
      const int64_t known = call_.start + token + 1 - first;
      for (int64_t j = known > 0 ? known : 0; j < count; ++j) scores[j] = kNever;
      return;
    }
    const int64_t row = row_in(call_.mask, sequence * call_.tokens + token);
    const auto* const mask = static_cast<const unsigned char*>(call_.mask.data) + row * call_.mask.row_stride + first;
    for (int64_t j = 0; j < count; ++j) scores[j] = mask[j] != 0 ? scores[j] : kNever;
  }

  void add_values(int64_t sequence, int64_t group, int64_t first, int64_t end, float* sums) const {
    const int64_t count = end - first;
    for (int64_t i = 0; i < n_; ++i) {
      float* const scores = scores_ + i * kChunk;
      Floats highest = splat(kNever);
      for (int64_t j = 0; j < count; j += kLanes) {
        const Floats x = load(scores + j);
        highest = x > highest ? x : highest;
      }
      float maximum = kNever;
      for (int lane = 0; lane < kLanes; ++lane) maximum = highest[lane] > maximum ? highest[lane] : maximum;
      Floats total = {};
      for (int64_t j = 0; j < count; j += kLanes) {
        const Floats x = load(scores + j), p = x > kNever ? exp(x - maximum) : Floats{};
        store(scores + j, p);
        total += p;
      }
      maxima(sums)[i] = maximum;
      totals(sums)[i] = sum(total);
      for (int64_t k = 0; k < sums_stride_; k += kLanes) store(sums + i * sums_stride_ + k, Floats{});
    }
    const T* const keys = cached(call_.keys, sequence, group, end);  // of the next chunk
    const T* const values = cached(call_.values, sequence, group, first);
    const int64_t ahead = length() - end < kChunk ? length() - end : kChunk;
    for (int64_t j = 0; j < count; j += kStep) {
      const int64_t next = j + kStep < count ? j + kStep : count;
      if (next <= ahead) fetch(keys + j * call_.size, (next - j) * call_.size);
      add_rows(n_, scores_ + j, kChunk, values + j * call_.size, call_.size, next - j, call_.rank, sums, sums_stride_);
    }
  }

  // Query i of a key and value head: its chunks in order.
  void combine_row(int64_t head, int64_t i) const {
    float maximum = kNever, total = 0;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const float x = maxima(chunk_of(head, chunk))[i];
      maximum = x > maximum ? x : maximum;
    }
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      float& weight = maxima(chunk_of(head, chunk))[i];
      weight = exp(splat(weight - maximum))[0];
      total += weight * totals(chunk_of(head, chunk))[i];
    }
    const int64_t m = head / call_.groups * call_.tokens + i / per_group();
    const int64_t query = head % call_.groups * per_group() + i % per_group();
    T* const to = static_cast<T*>(call_.y.data) + m * call_.y.row_stride + query * call_.rank;
    for (int64_t k = 0; k < call_.rank; k += kLanes) {
      Floats x = {};
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
        x += load(chunk_of(head, chunk) + i * sums_stride_ + k) * maxima(chunk_of(head, chunk))[i];
      }
      store(to + k, total > 0 ? x / total : Floats{}, call_.rank - k);
    }
  }

  float* chunk_of(int64_t head, int64_t chunk) const { return sums(head * chunks_ + chunk); }

  const Attend& call_;
  const int64_t n_, chunks_, sums_stride_;
  Kept* kept_ = nullptr;
  float* scores_ = nullptr;
  float* head_ = nullptr;
  T* rounded_ = nullptr;
};

// f(attention) with the attention of the call's dtype.
template <class Function>
inline void with_attention(const Attend& call, float* own, Function&& f) {
  switch (call.dtype) {
    case SGF_FLOAT32:
      return f(Attention<float>(call, own));
    case SGF_FLOAT16:
      return f(Attention<Float16>(call, own));
    case SGF_BFLOAT16:
      return f(Attention<BFloat16>(call, own));
  }
}

constexpr AttendKernel kAttend = {
    [](const Attend& call, int part, int parts, float* own) {
      with_attention(call, own, [=](const auto& attention) { attention.share(part, parts); });
    },
    [](const Attend& call, int part, int parts) {
      with_attention(call, nullptr, [=](const auto& attention) { attention.combine(part, parts); });
    },
};

}  // namespace
}  // namespace sgf
