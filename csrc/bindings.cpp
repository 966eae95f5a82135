// Binds the C interface of slicegpt_fast.h to Python as slicegpt_fast._C, function by function and under the same names
// less the prefix. The types that Python sees stand in slicegpt_fast/_C.pyi. Those of csrc/cuda/ are bound beside it.
#include "bindings.h"

#include <memory>

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

struct DeleteProgram {
  void operator()(sgf_program* program) const { sgf_program_delete(program); }
};

struct Program {
  std::unique_ptr<sgf_program, DeleteProgram> owned{sgf_program_new()};

  Program() {
    if (owned == nullptr) sgf::check(SGF_OUT_OF_MEMORY);
  }
};

// A function of slicegpt_fast.h as a method of Program; it raises what the status says.
template <class Handle, class... Arguments>
auto method(int (*function)(Handle*, Arguments...)) {
  return
      [function](Program& program, Arguments... arguments) { sgf::check(function(program.owned.get(), arguments...)); };
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
  m.def("dequantize", checked(&sgf_dequantize), others_run);
  m.def("attend", checked(&sgf_attend), others_run);
  py::class_<Program>(m, "Program")
      .def(py::init())
      .def("norm_linear", method(&sgf_program_norm_linear))
      .def("residual_linear", method(&sgf_program_residual_linear))
      .def("attend", method(&sgf_program_attend))
      .def("cache", method(&sgf_program_cache))
      .def("run", method(&sgf_program_run), others_run);
#ifdef SGF_CUDA
  sgf::bind_cuda(m);
#endif
}
