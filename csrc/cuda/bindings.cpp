// Binds the CUDA launchers of slicegpt_fast.h, where this build has them.
#include <tuple>

#include "bindings.h"

namespace {

using sgf::check;
using sgf::pointer;

using Plan = std::tuple<int, int64_t, int64_t>;

Plan plan_of(sgf_cuda_plan plan) { return {plan.splits, plan.workspace, plan.counters}; }

sgf_cuda_plan plan_from(Plan plan) { return {std::get<0>(plan), std::get<1>(plan), std::get<2>(plan)}; }

Plan cuda_norm_linear_plan(int M, int64_t scaled, int64_t unscaled, int K, int activation, int sms) {
  return plan_of(sgf_cuda_norm_linear_plan(M, scaled, unscaled, K, activation, sms));
}

void cuda_norm_linear(uintptr_t h, int64_t stride_h, uintptr_t weight, int64_t stride_weight, uintptr_t bias,
                      uintptr_t sumsq, uintptr_t y, int64_t stride_y, int M, int64_t scaled, int64_t unscaled, int K,
                      float eps, float inverse_width, int activation, int dtype, Plan plan, uintptr_t workspace,
                      uintptr_t counters, uintptr_t stream) {
  check(sgf_cuda_norm_linear(pointer(h), stride_h, pointer(weight), stride_weight, pointer(bias), pointer<float>(sumsq),
                             pointer(y), stride_y, M, scaled, unscaled, K, eps, inverse_width, activation, dtype,
                             plan_from(plan), pointer<float>(workspace), pointer<int32_t>(counters), pointer(stream)));
}

Plan cuda_residual_linear_plan(int M, int64_t n, int K, int K2, int sms) {
  return plan_of(sgf_cuda_residual_linear_plan(M, n, K, K2, sms));
}

void cuda_residual_linear(uintptr_t a, int64_t stride_a, uintptr_t weight, int64_t stride_weight, uintptr_t a2,
                          int64_t stride_a2, uintptr_t weight2, int64_t stride_weight2, bool weight2_along_n,
                          uintptr_t bias, uintptr_t residual, int64_t stride_residual, uintptr_t y, int64_t stride_y,
                          uintptr_t sumsq, int M, int64_t n, int K, int K2, int dtype, Plan plan, uintptr_t workspace,
                          uintptr_t counters, uintptr_t stream) {
  check(sgf_cuda_residual_linear(
      pointer(a), stride_a, pointer(weight), stride_weight, pointer(a2), stride_a2, pointer(weight2), stride_weight2,
      weight2_along_n, pointer(bias), pointer(residual), stride_residual, pointer(y), stride_y, pointer<float>(sumsq),
      M, n, K, K2, dtype, plan_from(plan), pointer<float>(workspace), pointer<int32_t>(counters), pointer(stream)));
}
#ifdef SGF_SM90A
Plan cuda_covariance_plan(int64_t N, int64_t D, int sms) { return plan_of(sgf_cuda_covariance_plan(N, D, sms)); }

void cuda_covariance(uintptr_t x, int64_t stride, int64_t N, int64_t D, uintptr_t row_scale, uintptr_t mask,
                     uintptr_t planes, uintptr_t acc, int64_t stride_row, int64_t stride_column, int acc_dtype,
                     int dtype, Plan plan, uintptr_t workspace, uintptr_t stream) {
  check(sgf_cuda_covariance(pointer(x), stride, N, D, pointer<float>(row_scale), pointer<uint8_t>(mask),
                            pointer(planes), pointer(acc), stride_row, stride_column, acc_dtype, dtype, plan_from(plan),
                            pointer<float>(workspace), pointer(stream)));
}

void cuda_row_squares(uintptr_t h, int64_t stride_h, int M, int K, uintptr_t sumsq, int dtype, uintptr_t stream) {
  check(sgf_cuda_row_squares(pointer(h), stride_h, M, K, pointer<float>(sumsq), dtype, pointer(stream)));
}

void cuda_norm_linear_prefill(uintptr_t h, int64_t stride_h, uintptr_t weight, int64_t stride_weight, uintptr_t bias,
                              uintptr_t sumsq, uintptr_t y, int64_t stride_y, int M, int scaled, int unscaled, int K,
                              float eps, float inverse_width, int activation, int dtype, int sms, uintptr_t stream) {
  check(sgf_cuda_norm_linear_prefill(pointer(h), stride_h, pointer(weight), stride_weight, pointer(bias),
                                     pointer<float>(sumsq), pointer(y), stride_y, M, scaled, unscaled, K, eps,
                                     inverse_width, activation, dtype, sms, pointer(stream)));
}

void cuda_residual_linear_prefill(uintptr_t a, int64_t stride_a, uintptr_t weight, int64_t stride_weight, uintptr_t a2,
                                  int64_t stride_a2, uintptr_t weight2, int64_t stride_weight2, bool weight2_along_n,
                                  uintptr_t bias, uintptr_t residual, int64_t stride_residual, uintptr_t y,
                                  int64_t stride_y, uintptr_t sumsq, int M, int n, int K, int K2, int dtype, int sms,
                                  uintptr_t workspace, int64_t workspace_cells, uintptr_t stream) {
  check(sgf_cuda_residual_linear_prefill(
      pointer(a), stride_a, pointer(weight), stride_weight, pointer(a2), stride_a2, pointer(weight2), stride_weight2,
      weight2_along_n, pointer(bias), pointer(residual), stride_residual, pointer(y), stride_y, pointer<float>(sumsq),
      M, n, K, K2, dtype, sms, pointer<float>(workspace), workspace_cells, pointer(stream)));
}
#endif

}  // namespace

void sgf::bind_cuda(pybind11::module_& m) {
  m.def("cuda_probe", [](uintptr_t out, int threads, uintptr_t stream) {
    check(sgf_cuda_probe(pointer<int32_t>(out), threads, pointer(stream)));
  });
  m.def("cuda_norm_linear_plan", &cuda_norm_linear_plan);
  m.def("cuda_norm_linear", &cuda_norm_linear);
  m.def("cuda_residual_linear_plan", &cuda_residual_linear_plan);
  m.def("cuda_residual_linear", &cuda_residual_linear);
#ifdef SGF_SM90A
  m.def("cuda_covariance_plan", &cuda_covariance_plan);
  m.def("cuda_covariance", &cuda_covariance);
  m.def("cuda_row_squares", &cuda_row_squares);
  m.def("cuda_norm_linear_prefill", &cuda_norm_linear_prefill);
  m.def("cuda_residual_linear_prefill_workspace", &sgf_cuda_residual_linear_prefill_workspace);
  m.def("cuda_residual_linear_prefill", &cuda_residual_linear_prefill);
#endif
}
