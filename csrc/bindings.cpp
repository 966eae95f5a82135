// Binds the C interface of slicegpt_fast.h to Python as slicegpt_fast._C, function by function and under the same names
// less the prefix. The types that Python sees stand in slicegpt_fast/_C.pyi.
//
// Device memory and streams arrive as integers (tensor.data_ptr(), stream.cuda_stream): whoever calls from Python has
// checked the tensors.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "slicegpt_fast.h"

namespace py = pybind11;

namespace {

void check(int status) {
  if (status > 0) throw std::runtime_error(sgf_status_text(status));     // CUDA
  if (status < 0) throw std::invalid_argument(sgf_status_text(status));  // the caller's: ValueError in Python
}

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
  if (level < 0) check(level);
  return sgf_cpu_isa_name(level);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info);
  m.def("cpu_features", &sgf_cpu_features);
  m.def("cpu_isa", &cpu_isa);
  m.def("cpu_isa_names", &cpu_isa_names);
#ifdef SGF_CUDA
  m.def("cuda_probe", [](uintptr_t out, int threads, uintptr_t stream) {
    check(sgf_cuda_probe(reinterpret_cast<int32_t*>(out), threads, reinterpret_cast<void*>(stream)));
  });
#endif
}
