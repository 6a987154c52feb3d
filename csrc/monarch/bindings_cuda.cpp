#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "monarch/monarch_matmul_cuda.h"

namespace py = pybind11;

namespace kexue {
namespace {

using Address = uintptr_t;

template <class T = void>
T* address(int64_t x) {
  return reinterpret_cast<T*>(Address(x));
}

void monarch_matmul(const std::array<int, 7>& sizes, int cluster, int dtype,
                    const std::array<int64_t, 2>& x,  // address, stride of rows
                    Address w1, Address w2, Address bias, Address y, Address stream) {
  const auto [N, k, q, p, l, s, r] = sizes;
  monarch::ClusterCall call = {};
  call.sizes = {N, k, q, p, l, s, r, cluster};
  call.dtype = DType(dtype);
  call.x = address(x[0]), call.stride = x[1];
  call.w1 = address(w1), call.w2 = address(w2), call.bias = address(bias), call.y = address(y);
  monarch::monarch_matmul_cuda(call, address(stream));
}

}  // namespace

void bind_monarch_cuda(py::module_& m) {
  m.def("monarch_matmul_cuda", &monarch_matmul, py::call_guard<py::gil_scoped_release>(),
        py::arg("sizes"), py::arg("cluster"), py::arg("dtype"), py::arg("x"), py::arg("w1"),
        py::arg("w2"), py::arg("bias"), py::arg("y"), py::arg("stream"));
}

}  // namespace kexue
