// Binds the C interface of slicegpt_fast.h to Python as slicegpt_fast._C, function by function and under the same names
// less the prefix. The types that Python sees stand in slicegpt_fast/_C.pyi. Those of csrc/cuda/ are bound beside it.
#include "bindings.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace py = pybind11;

namespace {

using sgf::check;
using sgf::pointer;

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

using Workspace = std::unique_ptr<void, decltype(&std::free)>;

Workspace workspace(int64_t bytes) {
  Workspace memory(std::aligned_alloc(64, static_cast<std::size_t>((bytes + 63) / 64 * 64)), &std::free);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void covariance(uintptr_t acc, int acc_dtype, int64_t acc_stride, uintptr_t x, int dtype, int64_t x_stride,
                uintptr_t rows, uintptr_t row_scale, int64_t N, int64_t D, int threads) {
  const py::gil_scoped_release release;
  const Workspace memory = workspace(sgf_covariance_workspace(N, D, threads));
  check(sgf_covariance(pointer(acc), acc_dtype, acc_stride, pointer(x), dtype, x_stride, pointer<int64_t>(rows),
                       pointer<float>(row_scale), N, D, threads, memory.get()));
}

void norm_linear(int dtype, int64_t M, int64_t n, int64_t K, uintptr_t h, int64_t h_stride, uintptr_t weight,
                 int64_t weight_row_stride, int64_t weight_column_stride, uintptr_t product, int64_t product_stride,
                 uintptr_t bias, double eps, double full_width, uintptr_t sumsq, int activation, int64_t unscaled,
                 uintptr_t y, int threads) {
  const py::gil_scoped_release release;
  const Workspace memory = workspace(sgf_linear_workspace(M, n, K, 0));
  check(sgf_norm_linear(dtype, M, n, K, pointer(h), h_stride, pointer(weight), weight_row_stride, weight_column_stride,
                        pointer(product), product_stride, pointer(bias), eps, full_width, pointer<float>(sumsq),
                        activation, unscaled, pointer(y), threads, memory.get()));
}

void residual_linear(int dtype, int64_t M, int64_t n, int64_t K, uintptr_t a, int64_t a_stride, uintptr_t weight,
                     int64_t weight_row_stride, int64_t weight_column_stride, uintptr_t bias, uintptr_t residual,
                     int64_t residual_stride, int64_t K2, uintptr_t a2, int64_t a2_stride, uintptr_t weight2,
                     int64_t weight2_row_stride, int64_t weight2_column_stride, uintptr_t y, uintptr_t sumsq,
                     int threads) {
  const py::gil_scoped_release release;
  const Workspace memory = workspace(sgf_linear_workspace(M, n, K, K2));
  check(sgf_residual_linear(dtype, M, n, K, pointer(a), a_stride, pointer(weight), weight_row_stride,
                            weight_column_stride, pointer(bias), pointer(residual), residual_stride, K2, pointer(a2),
                            a2_stride, pointer(weight2), weight2_row_stride, weight2_column_stride, pointer(y),
                            pointer<float>(sumsq), threads, memory.get()));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info);
  m.def("cpu_features", &sgf_cpu_features);
  m.def("cpu_isa", &cpu_isa);
  m.def("cpu_isa_names", &cpu_isa_names);
  m.def("covariance", &covariance);
  m.def("norm_linear", &norm_linear);
  m.def("residual_linear", &residual_linear);
#ifdef SGF_CUDA
  sgf::bind_cuda(m);
#endif
}
