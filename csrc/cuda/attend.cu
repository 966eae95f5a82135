// attend: the attention of a decode step, split over the length of the cache.
//
//                  K, V of one sequence and key and value head [S, D]
//                  +-----------------+-----------------+-------------+-----+
//                  | split 0         | split 1         | split 2     | new |   block = (item, split); item = (sequence,
//                  +-----------------+-----------------+-------------+-----+   key and value head, tile of 16 queries)
//      warp 0 .. 7:  16 positions each, in turn
//
//   Q [16, D] shared --A-->  scores --exp--> A --> sums [16, rank] fp32, in registers, with maximum and total per row
//   K 16 x D registers --B--^      V 16 x rank registers --B--^
//
// Every block normalises and rotates its queries. The last split appends the new tokens, rotated, to the cache before
// it reads them there; nobody else reads them. (Where an item has more than one tile, all of them write the same bits.)
// Keys and values go from global memory into registers, in fragment order (attend.h), 16 bytes per lane and load: the
// next step's keys are on their way while this step's values are multiplied, and the other way round. At the end the
// warps' sums meet in shared memory, the splits' in the workspace, where the last block of an item adds them in order.
// A split's share follows from `start`, which is read here: a captured graph serves every length.
//
//     Bytes  2 S (D + rank) per sequence and key and value head, and as much again for every 16 queries, out of L2
//     FLOPs  32 S (D + rank): 16 rows, however few are queries
//     Flight 64 KB per SM (D = 128), 32 KB per block and two of them (D = 64)
//     Floor  32 heads of 128, S = 4096, on an H100 (3.0 TB/s copy): 67 MB, 22.4 us; S = 1024: 5.6 us
//     Share  not yet measured; predicted 0.85 at S = 4096 (2 us to prepare and start, 2 us to add up), 0.6 at 1024
//
// A token of Llama-2-7B at 75 % (d = 3072, one basis for all layers) on an H100, counted from the bytes: a layer's
// weights are 304 MB (QKV 75, o 25, gate/up 135, down 68), 101 us; 32 layers and the head (197 MB) 3.30 ms. This
// kernel adds 32 floors: 0.18 ms at S = 1024, 0.72 ms at 4096. At the shares that are predicted for each kernel (0.87
// for the weights) a token takes 3.8 + 0.3 = 4.1 ms at S = 1024 and 3.8 + 0.84 = 4.6 ms at 4096, in a captured graph.
#include "cuda/attend.h"

#include "cuda/decode.cuh"

namespace {

using namespace sgf::attend;
using sgf::Bfloat16, sgf::Half;
using sgf::decode::Lane, sgf::decode::lane_of, sgf::decode::load_elements, sgf::decode::load_vector,
    sgf::decode::Vector;

constexpr float kNever = -3e38f;  // the score of a position that counts nowhere
constexpr float kLog2E = 1.4426950408889634f;
constexpr int kPitch = kGroup + 4;  // of the warps' sums in shared memory: whole float4s, rows apart in the banks

// The first number of head h of token m is data[m * row + h * head].
struct Heads {
  const uint16_t* data;
  int64_t row, head;

  __device__ const uint16_t* at(int64_t m, int h) const { return data + m * row + h * head; }
};

// A matrix with one row per token of the batch, or one per token of every sequence.
template <class T>
struct Rows {
  const T* data;
  int64_t row, sequence;

  __device__ const T* at(int b, int token) const { return data + b * sequence + token * row; }
};

struct Arguments {
  Heads queries, new_keys, new_values;
  Rows<uint16_t> cosine, sine;
  Rows<uint8_t> mask;
  const uint16_t *query_norm, *key_norm;
  uint16_t *keys, *values;  // [sequences and groups][positions][size]
  int64_t stride_keys, stride_values;
  const int64_t* start;
  uint16_t* y;
  int64_t stride_y;
  int tokens, groups, shared, tiles, size, rank, half;  // heads that share a group; numbers that are rotated, halved
  float eps, scale;
  float* workspace;
  int32_t* counters;
};

// Where a block stands.
struct Item {
  int sequence, group, tile, head;  // head: of the caches

  __device__ explicit Item(const Arguments& p)
      : tile(static_cast<int>(blockIdx.x) % p.tiles), head(static_cast<int>(blockIdx.x) / p.tiles) {
    sequence = head / p.groups, group = head % p.groups;
  }
};

// Query `row` of a tile: its token and its head among those that share the group.
struct Query {
  int token, head;
  bool there;

  __device__ Query(const Arguments& p, const Item& item, int row) {
    const int index = item.tile * kRows + row;
    token = index / p.shared, head = index % p.shared, there = index < p.tokens * p.shared;
  }
};

template <int kSize>
struct Shared {
  static constexpr int kRow = kSize + kChunk;  // rows of queries lie half of the banks apart
  alignas(16) uint16_t queries[kRows][kRow];
  union {
    float scratch[kWarps][kSize];                    // heads, while they are prepared
    alignas(16) float sums[kWarps][kRows * kPitch];  // then the warps' sums of 64 columns
    float weights[kMaxSplits][kRows];                // then what the splits count
  };
  float maxima[kWarps][kRows], totals[kWarps][kRows];  // the warps'; at last those of the splits
};

// One head, normalised and rotated as the model does it, by one warp: put(k, bits) for each of its numbers.
template <class Element, class Put>
__device__ __forceinline__ void prepare(const Arguments& p, const uint16_t* from, const uint16_t* norm, int sequence,
                                        int token, float* scratch, Put put) {
  const int lane = threadIdx.x % 32;
  float square = 0;
  for (int k = lane; k < p.size; k += 32) {
    scratch[k] = Element::widen(from[k]);
    square += scratch[k] * scratch[k];
  }
  if (norm != nullptr) {
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) square += __shfl_xor_sync(0xffffffff, square, apart);
    const float scale = rsqrtf(square / static_cast<float>(p.size) + p.eps);
    for (int k = lane; k < p.size; k += 32) {
      scratch[k] = Element::widen(Element::round(scratch[k] * scale)) * Element::widen(norm[k]);
    }
  }
  __syncwarp();
  for (int k = lane; k < p.size; k += 32) {
    float x = scratch[k];
    if (k < 2 * p.half) {
      const float other = k < p.half ? -scratch[k + p.half] : scratch[k - p.half];
      x = x * Element::widen(p.cosine.at(sequence, token)[k]) + other * Element::widen(p.sine.at(sequence, token)[k]);
    }
    put(k, Element::round(x));
  }
  __syncwarp();
}

// What a lane holds of 16 rows: C fragments over the values' numbers, and of its two rows maximum and own total.
template <int kSize>
struct Sums {
  float tile[kSize / kGroup][kVector][4] = {};
  float maximum[2] = {kNever, kNever}, total[2] = {};
};

// One warp's way through its positions.
template <class Element, int kSize, bool kVectors>
struct Stream {
  // Where registers hold a step's keys and values, those of the next are loaded in advance; else one half at a time.
  static constexpr bool kAhead = kVectors && kSize < kMaxSize;
  static constexpr int kParts = kAhead ? 1 : 2, kChunks = kSize / kChunk / kParts, kGroups = kSize / kGroup / kParts;

  const Arguments& p;
  const Shared<kSize>& shared;
  const uint16_t *keys, *values;  // of the item's head
  Lane lane;
  int last;                // of the split's positions
  int known[2];            // of this lane's rows: how many positions their token attends to
  const uint8_t* mask[2];  // their rows of the mask, or null
  Vector key[2][kChunks], value[kGroups][4];

  __device__ __forceinline__ void load_keys(int step, int part) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int position = step + key_position(lane.group, j);
      const uint16_t* const row = keys + static_cast<int64_t>(position) * p.size + kVector * lane.member;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int k = kChunk * (part * kChunks + c);
        key[j][c] = load(row + k, position < last ? clamp(p.size - kVector * lane.member - k, kVector) : 0);
      }
    }
  }

  __device__ __forceinline__ void load_values(int step, int part) {
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const int position = step + value_position(lane.member, v);
      const uint16_t* const row = values + static_cast<int64_t>(position) * p.size + kVector * lane.group;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const int k = kGroup * (part * kGroups + g);
        value[g][v] = load(row + k, position < last ? clamp(p.rank - kVector * lane.group - k, kVector) : 0);
      }
    }
  }

  static __device__ __forceinline__ Vector load(const uint16_t* from, int count) {
    if constexpr (kVectors) {
      return load_vector<true>(from, count);
    } else {
      return load_elements(from, count);
    }
  }

  __device__ __forceinline__ void score(int part, float (&scores)[2][4]) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const auto row = [&](int half) {
        return *reinterpret_cast<const uint4*>(
            &shared.queries[lane.group + 8 * half][kChunk * (part * kChunks + c) + kVector * lane.member]);
      };
      const uint4 low = row(0), high = row(1);
      const uint32_t a[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint32_t b[2] = {key[j][c].pair[2 * step], key[j][c].pair[2 * step + 1]};
          sgf::mma<Element::kBfloat16>(scores[j], a[step], b);
        }
      }
    }
  }

  // Scores to probabilities, to the base 2 and not yet divided, as the next product's fragment.
  __device__ __forceinline__ void weigh(int step, const float (&scores)[2][4], Sums<kSize>& sums,
                                        uint32_t (&a)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x[4];
      bool counts[4];
      float highest = sums.maximum[half];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = i / 2, c = 2 * half + i % 2, position = step + score_position(lane.member, j, c);
        counts[i] = position < (mask[half] == nullptr ? known[half] : last);
        if (mask[half] != nullptr && counts[i]) counts[i] = mask[half][position] != 0;
        x[i] = counts[i] ? scores[j][c] * p.scale : kNever;
        highest = fmaxf(highest, x[i]);
      }
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, 2));
      const float before = exp2f(sums.maximum[half] - highest);
      sums.maximum[half] = highest;
      sums.total[half] *= before;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = counts[i] ? exp2f(x[i] - highest) : 0;
        sums.total[half] += x[i];
      }
      a[half] = Element::pack(x[0], x[1]);
      a[half + 2] = Element::pack(x[2], x[3]);
#pragma unroll
      for (int g = 0; g < kSize / kGroup; ++g) {
#pragma unroll
        for (int e = 0; e < kVector; ++e) sums.tile[g][e][2 * half] *= before, sums.tile[g][e][2 * half + 1] *= before;
      }
    }
  }

  __device__ __forceinline__ void add_values(int part, const uint32_t (&a)[4], Sums<kSize>& sums) const {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        uint32_t b[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t even = value[g][2 * i].pair[e / 2], odd = value[g][2 * i + 1].pair[e / 2];
          b[i] = e % 2 == 0 ? (even & 0xffff) | (odd << 16) : (even >> 16) | (odd & 0xffff0000);
        }
        sgf::mma<Element::kBfloat16>(sums.tile[part * kGroups + g][e], a, b);
      }
    }
  }

  __device__ __forceinline__ void run(int first, Sums<kSize>& sums) {
    int step = first + kStep * static_cast<int>(threadIdx.x / 32);
    if (kAhead) load_keys(step, 0), load_values(step, 0);
    for (; step < last; step += kBlockStep) {
      float scores[2][4] = {};
      uint32_t a[4];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        if (!kAhead) load_keys(step, part);
        score(part, scores);
      }
      if (kAhead) load_keys(step + kBlockStep, 0);
      weigh(step, scores, sums, a);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        if (!kAhead) load_values(step, part);
        add_values(part, a, sums);
      }
      if (kAhead) load_values(step + kBlockStep, 0);
    }
  }
};

// The queries into shared memory, and from the last split the new tokens into the cache.
template <class Element, int kSize>
__device__ __forceinline__ void begin(const Arguments& p, const Item& item, int start, bool last_split,
                                      Shared<kSize>& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* const scratch = shared.scratch[warp];
  for (int row = warp; row < kRows; row += kWarps) {
    const Query query(p, item, row);
    for (int k = lane; k < kSize; k += 32) shared.queries[row][k] = 0;
    __syncwarp();
    if (!query.there) continue;
    const uint16_t* const from =
        p.queries.at(static_cast<int64_t>(item.sequence) * p.tokens + query.token, item.group * p.shared + query.head);
    prepare<Element>(p, from, p.query_norm, item.sequence, query.token, scratch,
                     [&](int k, uint16_t bits) { shared.queries[row][k] = bits; });
  }
  for (int token = last_split ? warp : p.tokens; token < p.tokens; token += kWarps) {
    const int64_t m = static_cast<int64_t>(item.sequence) * p.tokens + token;
    const int64_t position = static_cast<int64_t>(start) + token;
    uint16_t* const key = p.keys + item.head * p.stride_keys + position * p.size;
    uint16_t* const value = p.values + item.head * p.stride_values + position * p.size;
    prepare<Element>(p, p.new_keys.at(m, item.group), p.key_norm, item.sequence, token, scratch,
                     [&](int k, uint16_t bits) { key[k] = bits; });
    const uint16_t* const from = p.new_values.at(m, item.group);
    for (int k = lane; k < p.size; k += 32) value[k] = k < p.rank ? from[k] : 0;
  }
  __syncthreads();
}

// The warps' maxima and totals to shared memory.
template <int kSize>
__device__ __forceinline__ void share_totals(const Lane& lane, Sums<kSize>& sums, Shared<kSize>& shared) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = sums.total[half];
    total += __shfl_xor_sync(0xffffffff, total, 1);
    total += __shfl_xor_sync(0xffffffff, total, 2);
    if (lane.member == 0) {
      shared.maxima[threadIdx.x / 32][lane.group + 8 * half] = sums.maximum[half];
      shared.totals[threadIdx.x / 32][lane.group + 8 * half] = total;
    }
  }
  __syncthreads();
}

template <int kSize>
__device__ __forceinline__ float highest_of(const Shared<kSize>& shared, int row) {
  float highest = kNever;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) highest = fmaxf(highest, shared.maxima[w][row]);
  return highest;
}

// Four neighbouring sums of one query over its total, rounded.
template <class Element>
__device__ __forceinline__ void finish(const Arguments& p, const Item& item, int row, int column, const float4& sums,
                                       float total) {
  const Query query(p, item, row);
  if (!query.there) return;
  const float scale = total > 0 ? 1 / total : 0, x[4] = {sums.x, sums.y, sums.z, sums.w};
  uint16_t* const to = p.y + (static_cast<int64_t>(item.sequence) * p.tokens + query.token) * p.stride_y +
                       static_cast<int64_t>(item.group * p.shared + query.head) * p.rank;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column + i < p.rank) to[column + i] = Element::round(x[i] * scale);
  }
}

template <class Element, int kSize, bool kVectors>
__global__ __launch_bounds__(kThreads, kSize == 64 ? 2 : 1) void attend_decode(Arguments p) {
  __shared__ Shared<kSize> shared;
  const int split = blockIdx.y, splits = gridDim.y, warp = threadIdx.x / 32;
  const int row = threadIdx.x / 16, quad = threadIdx.x % 16 * 4;  // of the sums that this thread adds up
  const Lane lane = lane_of(threadIdx.x % 32);
  const Item item(p);

  sgf::let_next_start();
  sgf::wait_for_previous();
  const int start = static_cast<int>(*p.start);
  const Positions positions = positions_of(start, p.tokens, split, splits);
  begin<Element>(p, item, start, split == splits - 1, shared);

  Sums<kSize> sums;
  {
    Stream<Element, kSize, kVectors> stream{
        p, shared, p.keys + item.head * p.stride_keys, p.values + item.head * p.stride_values, lane, positions.last};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Query query(p, item, lane.group + 8 * half);
      stream.known[half] = query.there ? start + query.token + 1 : 0;
      stream.mask[half] = query.there && p.mask.data != nullptr ? p.mask.at(item.sequence, query.token) : nullptr;
      if (positions.last < stream.known[half]) stream.known[half] = positions.last;
    }
    stream.run(positions.first, sums);
  }

  share_totals(lane, sums, shared);
  const float highest = highest_of(shared, row);
  float total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += shared.totals[w][row] * exp2f(shared.maxima[w][row] - highest);
  float own_scale[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    own_scale[half] = exp2f(sums.maximum[half] - highest_of(shared, lane.group + 8 * half));
  }
  float* const shares = p.workspace + static_cast<int64_t>(blockIdx.x) * splits * share_cells(kSize);
  float* const own = shares + split * share_cells(kSize);
#pragma unroll
  for (int g = 0; g < kSize / kGroup; ++g) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        shared.sums[warp][(lane.group + 8 * score_half(c)) * kPitch + sum_column(lane.member, e, c)] =
            sums.tile[g][e][c] * own_scale[score_half(c)];
      }
    }
    __syncthreads();
    float4 added{};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      sgf::decode::add(added, *reinterpret_cast<const float4*>(&shared.sums[w][row * kPitch + quad]));
    }
    if (splits == 1) {
      finish<Element>(p, item, row, kGroup * g + quad, added, total);
    } else {
      *reinterpret_cast<float4*>(own + row * kSize + kGroup * g + quad) = added;
    }
    __syncthreads();
  }
  if (splits == 1) return;
  if (quad == 0) own[kRows * kSize + row] = highest, own[kRows * (kSize + 1) + row] = total;
  if (!sgf::arrives_last(p.counters + blockIdx.x, splits)) return;

  // Of every split: its maximum, then by how much its sums and its total count.
  const auto cell = [&](int s, int at) { return __ldcg(shares + s * share_cells(kSize) + kRows * kSize + at); };
  for (int i = threadIdx.x; i < splits * kRows; i += kThreads) {
    shared.weights[i / kRows][i % kRows] = cell(i / kRows, i % kRows);
  }
  __syncthreads();
  float most = kNever;
  for (int s = 0; s < splits; ++s) most = fmaxf(most, shared.weights[s][row]);
  __syncthreads();
  for (int s = quad / 4; s < splits; s += 16) shared.weights[s][row] = exp2f(shared.weights[s][row] - most);
  __syncthreads();
  if (item.tile * kRows + row >= p.tokens * p.shared) return;  // no query has this row
  total = 0;
#pragma unroll 4
  for (int s = 0; s < splits; ++s) total += shared.weights[s][row] * cell(s, kRows + row);
#pragma unroll
  for (int g = 0; g < kSize / kGroup; ++g) {
    float4 added{};
#pragma unroll 4
    for (int s = 0; s < splits; ++s) {
      const float weight = shared.weights[s][row];
      const float4 x =
          __ldcg(reinterpret_cast<const float4*>(shares + s * share_cells(kSize) + row * kSize + kGroup * g + quad));
      added.x += weight * x.x, added.y += weight * x.y, added.z += weight * x.z, added.w += weight * x.w;
    }
    finish<Element>(p, item, row, kGroup * g + quad, added, total);
  }
}

// [dtype is bf16][size], the last ones for rows that are no vectors
constexpr void (*kKernels[2][4])(Arguments) = {
    {attend_decode<Half, 64, true>, attend_decode<Half, 128, true>, attend_decode<Half, 256, true>,
     attend_decode<Half, 256, false>},
    {attend_decode<Bfloat16, 64, true>, attend_decode<Bfloat16, 128, true>, attend_decode<Bfloat16, 256, true>,
     attend_decode<Bfloat16, 256, false>}};

int64_t workspace_cells(int64_t items, int splits) { return splits == 1 ? 0 : items * splits * share_cells(kMaxSize); }

Heads heads_of(const sgf_matrix& matrix) {
  return {static_cast<const uint16_t*>(matrix.data), matrix.row_stride, matrix.column_stride};
}

template <class T>
Rows<T> rows_of(const sgf_matrix& matrix, int tokens) {
  return {static_cast<const T*>(matrix.data), matrix.row_stride,
          matrix.rows == tokens ? 0 : tokens * matrix.row_stride};
}

bool is_vectors(const sgf_matrix& cache, int64_t size) {
  return reinterpret_cast<uintptr_t>(cache.data) % 16 == 0 && size % kVector == 0 &&
         (cache.rows == 1 || cache.row_stride % kVector == 0);
}

}  // namespace

sgf_cuda_plan sgf_cuda_attend_plan(int64_t batch, int tokens, int heads, int groups, int64_t positions, int sms) {
  const int64_t items = batch * groups * tiles_of(tokens, heads, groups);
  const int splits = choose_splits(items, positions, sms);
  return {splits, workspace_cells(items, splits), splits > 1 ? items : 0};
}

int sgf_cuda_attend(sgf_matrix queries, sgf_matrix new_keys, sgf_matrix new_values, sgf_matrix cosine, sgf_matrix sine,
                    sgf_matrix query_norm, sgf_matrix key_norm, sgf_matrix keys, sgf_matrix values, sgf_matrix mask,
                    sgf_matrix start, sgf_matrix y, int64_t batch, int64_t size, int64_t rank, double eps, double scale,
                    int dtype, int splits, sgf_matrix workspace, sgf_matrix counters, uintptr_t stream) {
  const bool fits = batch >= 1 && queries.rows >= batch && queries.rows <= INT32_MAX && queries.rows % batch == 0 &&
                    new_keys.columns >= 1 && queries.columns % new_keys.columns == 0 && size >= 1 && size <= kMaxSize &&
                    rank >= 1 && rank <= size && cosine.columns <= size && splits >= 1 && splits <= kMaxSplits &&
                    (dtype == SGF_FLOAT16 || dtype == SGF_BFLOAT16);
  if (!fits || queries.data == nullptr || new_keys.data == nullptr || new_values.data == nullptr ||
      keys.data == nullptr || values.data == nullptr || start.data == nullptr || y.data == nullptr) {
    return SGF_CUDA_BAD_ARGUMENT;
  }
  const int tokens = static_cast<int>(queries.rows / batch), heads = static_cast<int>(queries.columns);
  const int groups = static_cast<int>(new_keys.columns), tiles = tiles_of(tokens, heads, groups);
  const int64_t items = batch * groups * tiles;
  if (items > INT32_MAX) return SGF_CUDA_BAD_ARGUMENT;
  if (const int status =
          sgf::decode::check_cells(workspace, workspace_cells(items, splits), counters, splits > 1 ? items : 0)) {
    return status;
  }
  if (const int status = sgf::check_operands(
          {queries, new_keys, new_values, cosine, sine, query_norm, key_norm, keys, values, y}, sizeof(uint16_t))) {
    return status;
  }
  if (const int status = sgf::check_operands({mask}, 1)) return status;
  if (const int status = sgf::check_operands({start}, sizeof(int64_t))) return status;
  const Arguments arguments{heads_of(queries),
                            heads_of(new_keys),
                            heads_of(new_values),
                            rows_of<uint16_t>(cosine, tokens),
                            rows_of<uint16_t>(sine, tokens),
                            rows_of<uint8_t>(mask, tokens),
                            static_cast<const uint16_t*>(query_norm.data),
                            static_cast<const uint16_t*>(key_norm.data),
                            static_cast<uint16_t*>(keys.data),
                            static_cast<uint16_t*>(values.data),
                            keys.row_stride,
                            values.row_stride,
                            static_cast<const int64_t*>(start.data),
                            static_cast<uint16_t*>(y.data),
                            y.row_stride,
                            tokens,
                            groups,
                            heads / groups,
                            tiles,
                            static_cast<int>(size),
                            static_cast<int>(rank),
                            static_cast<int>(cosine.columns / 2),
                            static_cast<float>(eps),
                            static_cast<float>(scale) * kLog2E,
                            static_cast<float*>(workspace.data),
                            static_cast<int32_t*>(counters.data)};
  const bool vectors = is_vectors(keys, size) && is_vectors(values, size);
  const int padded = padded_size(static_cast<int>(size), vectors);
  const int kernel = vectors ? padded == 64 ? 0 : padded == 128 ? 1 : 2 : 3;
  const dim3 grid(static_cast<unsigned>(items), static_cast<unsigned>(splits));
  return sgf::launch(kKernels[dtype == SGF_BFLOAT16][kernel], {grid, kThreads}, stream, arguments);
}
