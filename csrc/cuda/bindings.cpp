// Binds the CUDA launchers of slicegpt_fast.h, where this build has them. They keep the interpreter's lock: a launch is
// shorter than it would wait to get the lock back.
#include "bindings.h"

template <>
class pybind11::detail::type_caster<sgf_cuda_plan> {
 public:
  PYBIND11_TYPE_CASTER(sgf_cuda_plan, const_name("tuple[int, int, int]"));

  static handle cast(const sgf_cuda_plan& plan, return_value_policy, handle) {
    return make_tuple(plan.splits, plan.workspace, plan.counters).release();
  }
};

#ifdef SGF_SM90A
template <>
class pybind11::detail::type_caster<sgf_cuda_prefill_plan> {
 public:
  PYBIND11_TYPE_CASTER(sgf_cuda_prefill_plan, const_name("tuple[int, int, int]"));

  static handle cast(const sgf_cuda_prefill_plan& plan, return_value_policy, handle) {
    return make_tuple(plan.width, plan.splits, plan.workspace).release();
  }
};
#endif

void sgf::bind_cuda(pybind11::module_& m) {
  m.def("cuda_probe", checked(&sgf_cuda_probe));
  m.def("cuda_norm_linear_plan", &sgf_cuda_norm_linear_plan);
  m.def("cuda_norm_linear", checked(&sgf_cuda_norm_linear));
  m.def("cuda_residual_linear_plan", &sgf_cuda_residual_linear_plan);
  m.def("cuda_residual_linear", checked(&sgf_cuda_residual_linear));
  m.def("cuda_attend_plan", &sgf_cuda_attend_plan);
  m.def("cuda_attend", checked(&sgf_cuda_attend));
#ifdef SGF_SM90A
  m.def("cuda_covariance_plan", &sgf_cuda_covariance_plan);
  m.def("cuda_covariance", checked(&sgf_cuda_covariance));
  m.def("cuda_row_squares", checked(&sgf_cuda_row_squares));
  m.def("cuda_norm_linear_prefill_width", &sgf_cuda_norm_linear_prefill_width);
  m.def("cuda_norm_linear_prefill", checked(&sgf_cuda_norm_linear_prefill));
  m.def("cuda_residual_linear_prefill_plan", &sgf_cuda_residual_linear_prefill_plan);
  m.def("cuda_residual_linear_prefill", checked(&sgf_cuda_residual_linear_prefill));
#endif
}
