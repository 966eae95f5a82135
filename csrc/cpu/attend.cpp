#include "cpu/attend.h"

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace sgf {

namespace {

constexpr Variant<const AttendKernel> kVariants[] = {
    {"baseline", &kAttend},
#if defined(__x86_64__)
    {"avx2", &kAttendAvx2},
    {"avx512", &kAttendAvx512},
    {"avx512bf16", &kAttendAvx512Bf16},
#endif
};

}  // namespace

const AttendKernel* attend_kernel() {
  static const AttendKernel* const kernel = choose(kVariants);
  return kernel;
}

Attend attend(sgf_matrix queries, sgf_matrix new_keys, sgf_matrix new_values, sgf_matrix cosine, sgf_matrix sine,
              sgf_matrix query_norm, sgf_matrix key_norm, sgf_matrix keys, sgf_matrix values, sgf_matrix mask,
              sgf_matrix y, int64_t batch, int64_t size, int64_t rank, int64_t start, double eps, double scale,
              int dtype) {
  Attend call = {};
  call.dtype = dtype, call.batch = batch, call.tokens = queries.rows / batch;
  call.heads = queries.columns, call.groups = new_keys.columns;
  call.size = size, call.rank = rank, call.start = start;
  call.queries = queries, call.new_keys = new_keys, call.new_values = new_values;
  call.cosine = cosine, call.sine = sine;
  call.query_norm = query_norm.data, call.key_norm = key_norm.data;
  call.eps = eps, call.scale = scale;
  call.keys = keys, call.values = values, call.mask = mask, call.y = y;
  return call;
}

int64_t attend_shared_floats(const Attend& call) { return shared_floats(call); }
int64_t attend_own_floats(const Attend& call) { return ceil_div(own_floats(call), 16) * 16; }

}  // namespace sgf

int sgf_attend(sgf_matrix queries, sgf_matrix new_keys, sgf_matrix new_values, sgf_matrix cosine, sgf_matrix sine,
               sgf_matrix query_norm, sgf_matrix key_norm, sgf_matrix keys, sgf_matrix values, sgf_matrix mask,
               sgf_matrix y, int64_t batch, int64_t size, int64_t rank, int64_t start, double eps, double scale,
               int dtype, int threads) {
  const sgf::AttendKernel* const kernel = sgf::attend_kernel();
  if (kernel == nullptr) return SGF_UNKNOWN_CPU_ISA;
  sgf::Attend call = sgf::attend(queries, new_keys, new_values, cosine, sine, query_norm, key_norm, keys, values, mask,
                                 y, batch, size, rank, start, eps, scale, dtype);
  const int64_t shared = sgf::attend_shared_floats(call), own = sgf::attend_own_floats(call);
  const sgf::Workspace memory = sgf::workspace(threads * own + shared);
  if (memory == nullptr) return SGF_OUT_OF_MEMORY;
  call.shared = memory.get() + threads * own;
  sgf::parallel(threads, [&](int part) { kernel->share(call, part, threads, memory.get() + part * own); });
  sgf::parallel(threads, [&](int part) { kernel->combine(call, part, threads); });
  return SGF_OK;
}
