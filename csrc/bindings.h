// What bindings.cpp and cuda/bindings.cpp share: how Python's objects become the types of slicegpt_fast.h.
//
// An sgf_matrix is a tensor of one or two dimensions, or None where it is absent; whoever calls from Python has checked
// it. A tensor is asked by the names of its methods, so that nothing here needs torch.
#pragma once

#include <pybind11/pybind11.h>

#include <new>
#include <stdexcept>

#include "slicegpt_fast.h"

namespace sgf {

inline void check(int status) {
  if (status == SGF_OUT_OF_MEMORY) throw std::bad_alloc();
  if (status > 0) throw std::runtime_error(sgf_status_text(status));     // CUDA
  if (status < 0) throw std::invalid_argument(sgf_status_text(status));  // the caller's: ValueError in Python
}

// The function for Python: it raises what the status says.
template <class... Arguments>
auto checked(int (*function)(Arguments...)) {
  return [function](Arguments... arguments) { check(function(arguments...)); };
}

void bind_cuda(pybind11::module_& m);

}  // namespace sgf

template <>
class pybind11::detail::type_caster<sgf_matrix> {
 public:
  PYBIND11_TYPE_CASTER(sgf_matrix, const_name("Tensor | None"));

  bool load(handle tensor, bool) {
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    static PyObject* const shape = PyUnicode_InternFromString("shape");
    static PyObject* const stride = PyUnicode_InternFromString("stride");
    value = {};
    if (tensor.is_none()) return true;
    const object address = known(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr));
    const object sizes = known(PyObject_GetAttr(tensor.ptr(), shape));
    const object strides = known(PyObject_CallMethodNoArgs(tensor.ptr(), stride));
    const auto dimensions = PyTuple_Check(sizes.ptr()) ? PyTuple_GET_SIZE(sizes.ptr()) : 0;
    if (dimensions < 1 || dimensions > 2 || !PyTuple_Check(strides.ptr()) ||
        PyTuple_GET_SIZE(strides.ptr()) != dimensions) {
      return false;
    }
    value.data = PyLong_AsVoidPtr(address.ptr());
    value.rows = dimensions == 1 ? 1 : item(sizes, 0);
    value.columns = item(sizes, dimensions - 1);
    value.row_stride = dimensions == 1 ? 0 : item(strides, 0);
    value.column_stride = item(strides, dimensions - 1);
    if (PyErr_Occurred() != nullptr) throw error_already_set();
    return true;
  }

 private:
  static object known(PyObject* result) {
    if (result == nullptr) throw error_already_set();
    return reinterpret_steal<object>(result);
  }

  static int64_t item(const object& tuple, Py_ssize_t index) {
    return PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), index));
  }
};
