// Binds the C interface of slicegpt_fast.h to Python as slicegpt_fast._C, function by function and under the same names
// less the prefix. The types that Python sees stand in slicegpt_fast/_C.pyi. Those of csrc/cuda/ are bound beside it.
#include "bindings.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["revision"] = sgf_revision();
  info["compiler"] = sgf_compiler();
  info["cuda_compiler"] = sgf_cuda_compiler();
  info["cuda_archs"] = sgf_cuda_archs();
  return info;
}

py::tuple cpu_isa_names() {
  py::list names;
  for (int level = 0; level < sgf_cpu_isa_count(); ++level) names.append(sgf_cpu_isa_name(level));
  return py::tuple(names);
}

const char* cpu_isa() {
  const int level = sgf_cpu_isa();
  if (level < 0) sgf::check(level);
  return sgf_cpu_isa_name(level);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using sgf::checked;
  const py::call_guard<py::gil_scoped_release> others_run;  // while a kernel works

  m.def("build_info", &build_info);
  m.def("cpu_features", &sgf_cpu_features);
  m.def("cpu_isa", &cpu_isa);
  m.def("cpu_isa_names", &cpu_isa_names);
  m.def("covariance", checked(&sgf_covariance), others_run);
  m.def("norm_linear", checked(&sgf_norm_linear), others_run);
  m.def("residual_linear", checked(&sgf_residual_linear), others_run);
#ifdef SGF_CUDA
  sgf::bind_cuda(m);
#endif
}
