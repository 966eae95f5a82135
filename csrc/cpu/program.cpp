// Decode programs: a run of decoder layers, op after op, by one team of threads.
//
//   thread 0  prepare | share of op 0 |b| prepare | share of op 1 |b| ...       b: all wait for each other
//   thread 1  prepare | share of op 0 |b| prepare | share of op 1 |b| ...
//
// Called one by one, each op starts and ends a parallel region, between which one thread lays out the small operand. In
// a program every thread does that for itself: it is a few KB, which the others need in their own caches anyway. What
// is left between two ops is one barrier, 0.2 us on two cores of one socket.
//
//     Bytes  all weights of the layers once, and what they hold in the cache
//     Floor  SmolLM2-135M at 0.8 in bf16 behind 512 tokens, 30 layers: 170 + 12 MB, 7.9 ms on two cores of a Xeon that
//            read 23 GB/s; fp32: 15.8 ms
//     Share  of that 0.9 to 1.0
#include <cstring>
#include <memory>
#include <new>
#include <variant>
#include <vector>

#include "cpu/attend.h"
#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

using sgf::Attend;
using sgf::Linear;

struct sgf_program {
  std::vector<std::variant<Linear, Attend>> steps;
  std::vector<std::size_t> attends;  // which steps they are
};

namespace {

// What one run adds to a program.
struct Run {
  int64_t batch, tokens, first, start;
  sgf_matrix cosine, sine, mask;

  int64_t rows() const { return batch * tokens; }
};

sgf_matrix behind(sgf_matrix matrix, int64_t columns, int dtype) {
  matrix.data = static_cast<char*>(matrix.data) + columns * (dtype == SGF_FLOAT32 ? 4 : 2);
  matrix.columns -= columns;
  return matrix;
}

Attend in_run(Attend call, const Run& run) {
  call.batch = run.batch, call.tokens = run.tokens, call.start = run.start;
  call.keys = behind(call.keys, run.first * call.size, call.dtype);
  call.values = behind(call.values, run.first * call.size, call.dtype);
  call.cosine = run.cosine, call.sine = run.sine, call.mask = run.mask;
  return call;
}

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

struct Sizes {
  int64_t own = 0, shared = 0;  // floats: of each thread, of all
};

Sizes sizes(const sgf_program& program, const Run& run) {
  Sizes found;
  for (const auto& step : program.steps) {
    if (const Linear* linear = std::get_if<Linear>(&step)) {
      found.own = larger(found.own, sgf::workspace_floats(run.rows(), *linear));
    } else {
      const Attend call = in_run(std::get<Attend>(step), run);
      found.own = larger(found.own, sgf::attend_own_floats(call));
      found.shared = larger(found.shared, sgf::attend_shared_floats(call));
    }
  }
  return found;
}

}  // namespace

sgf_program* sgf_program_new(void) { return new (std::nothrow) sgf_program; }
void sgf_program_delete(sgf_program* program) { delete program; }

int sgf_program_norm_linear(sgf_program* program, sgf_matrix h, sgf_matrix weight, sgf_matrix scales,
                            sgf_matrix norm_weight, sgf_matrix bias, sgf_matrix y, int64_t unscaled, double eps,
                            double full_width, int activation, int weight_dtype, int dtype) {
  Linear call =
      sgf::norm_linear(h, weight, scales, bias, {}, {}, y, unscaled, eps, full_width, activation, weight_dtype, dtype);
  call.norm_weight = norm_weight.data;
  call.unscaled_factor = -1;
  program->steps.emplace_back(call);
  return SGF_OK;
}

int sgf_program_residual_linear(sgf_program* program, sgf_matrix a, sgf_matrix weight, sgf_matrix scales,
                                sgf_matrix bias, sgf_matrix residual, sgf_matrix a2, sgf_matrix weight2, sgf_matrix y,
                                int weight_dtype, int dtype) {
  program->steps.emplace_back(
      sgf::residual_linear(a, weight, scales, bias, residual, a2, weight2, y, {}, weight_dtype, dtype));
  return SGF_OK;
}

int sgf_program_attend(sgf_program* program, sgf_matrix queries, sgf_matrix new_keys, sgf_matrix new_values,
                       sgf_matrix query_norm, sgf_matrix key_norm, sgf_matrix y, int64_t size, int64_t rank, double eps,
                       double scale, int dtype) {
  program->attends.push_back(program->steps.size());
  program->steps.emplace_back(sgf::attend(queries, new_keys, new_values, {}, {}, query_norm, key_norm, {}, {}, {}, y, 1,
                                          size, rank, 0, eps, scale, dtype));
  return SGF_OK;
}

int sgf_program_cache(sgf_program* program, int64_t layer, sgf_matrix keys, sgf_matrix values) {
  Attend& call = std::get<Attend>(program->steps[program->attends[static_cast<std::size_t>(layer)]]);
  call.keys = keys, call.values = values;
  return SGF_OK;
}

int sgf_program_run(const sgf_program* program, int64_t batch, int64_t tokens, int64_t first, int64_t start,
                    sgf_matrix cosine, sgf_matrix sine, sgf_matrix mask, int threads) {
  const sgf::LinearKernel* const linears = sgf::linear_kernel();
  const sgf::AttendKernel* const attends = sgf::attend_kernel();
  if (linears == nullptr || attends == nullptr) return SGF_UNKNOWN_CPU_ISA;
  const Run run{batch, tokens, first, start, cosine, sine, mask};
  const Sizes size = sizes(*program, run);
  const int64_t own = sgf::ceil_div(size.own, 16) * 16;
  const sgf::Workspace memory = sgf::workspace(threads * own + size.shared);
  if (memory == nullptr) return SGF_OUT_OF_MEMORY;
  sgf::Barrier barrier;
  sgf::team(threads, [&](int part, int parts) {
    float* const workspace = memory.get() + part * own;
    for (const auto& step : program->steps) {
      if (const Linear* linear = std::get_if<Linear>(&step)) {
        Linear call = *linear;
        call.M = run.rows(), call.workspace = workspace;
        const int sharing = sgf::linear_parts(call.n, parts);
        if (part < sharing) {
          linears->prepare(call);
          linears->share(call, part, sharing);
        }
      } else {
        Attend call = in_run(std::get<Attend>(step), run);
        call.shared = memory.get() + threads * own;
        attends->share(call, part, parts, workspace);
        barrier.wait(parts);
        attends->combine(call, part, parts);
      }
      barrier.wait(parts);
    }
  });
  return SGF_OK;
}
