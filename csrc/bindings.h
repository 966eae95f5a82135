// What bindings.cpp and cuda/bindings.cpp share.
//
// Memory and streams arrive as integers (tensor.data_ptr(), stream.cuda_stream), 0 for what is absent: whoever calls
// from Python has checked the tensors.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "slicegpt_fast.h"

namespace sgf {

inline void check(int status) {
  if (status > 0) throw std::runtime_error(sgf_status_text(status));     // CUDA
  if (status < 0) throw std::invalid_argument(sgf_status_text(status));  // the caller's: ValueError in Python
}

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_cuda(pybind11::module_& m);

}  // namespace sgf
