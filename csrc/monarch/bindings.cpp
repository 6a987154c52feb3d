// The monarch family on CPU, for kexue_kernels/monarch/cpu_*.py: they allocate and check.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "monarch/monarch_threads.h"

namespace py = pybind11;

namespace kexue {
namespace {

using namespace monarch;

// Addresses come as integers (0: none), arrays as (address, *strides).
template <class T = void>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

using Sizes = std::array<int64_t, 3>;    // of weights
using Array1 = std::array<int64_t, 2>;
using Array2 = std::array<int64_t, 3>;
using Array3 = std::array<int64_t, 4>;

Factor factor(const Sizes& sizes) { return {sizes[0], sizes[1], sizes[2]}; }
Rows rows(const Array2& x) { return {pointer(x[0]), x[1], x[2]}; }
Weights weights(const Array3& w) { return {pointer(w[0]), w[1], w[2], w[3]}; }
Bias bias_of(const Array1& bias) { return {pointer(bias[0]), bias[1]}; }

void monarch_forward(int threads, int dtype, int64_t N, const Sizes& first, const Sizes& second,
                     const Array2& x, const Array3& w1, const Array3& w2, const Array1& bias,
                     int64_t y) {
  const MonarchMatmul call{static_cast<DType>(dtype), N,           factor(first), factor(second),
                           rows(x),                   weights(w1), weights(w2)};
  py::gil_scoped_release unlocked;
  monarch_matmul_on_threads(call, bias_of(bias), pointer(y), threads);
}

void monarch_backward(int threads, int dtype, int64_t N, const Sizes& first, const Sizes& second,
                      const Array2& grad, const Array2& x, const Array3& w1, const Array3& w2,
                      int64_t dx, int64_t dw1, int64_t dw2) {
  const MonarchMatmul call{static_cast<DType>(dtype), N,           factor(first), factor(second),
                           rows(x),                   weights(w1), weights(w2)};
  py::gil_scoped_release unlocked;
  monarch_matmul_backward_on_threads(call, rows(grad), pointer(dx), pointer(dw1), pointer(dw2),
                                     threads);
}

void block_diag_forward(int threads, int dtype, int64_t N, const Sizes& sizes, const Array2& x,
                        const Array3& w, const Array1& bias, int64_t y) {
  const BlockDiagMatmul call{static_cast<DType>(dtype), N, factor(sizes), rows(x), weights(w)};
  py::gil_scoped_release unlocked;
  block_diag_matmul_on_threads(call, bias_of(bias), pointer(y), threads);
}

void block_diag_backward(int threads, int dtype, int64_t N, const Sizes& sizes, const Array2& grad,
                         const Array2& x, const Array3& w, int64_t dx, int64_t dw) {
  const BlockDiagMatmul call{static_cast<DType>(dtype), N, factor(sizes), rows(x), weights(w)};
  py::gil_scoped_release unlocked;
  block_diag_matmul_backward_on_threads(call, rows(grad), pointer(dx), pointer(dw), threads);
}

}  // namespace

void bind_monarch(py::module_& m) {
  m.def("monarch_matmul_forward", &monarch_forward);
  m.def("monarch_matmul_backward", &monarch_backward);
  m.def("block_diag_matmul_forward", &block_diag_forward);
  m.def("block_diag_matmul_backward", &block_diag_backward);
}

}  // namespace kexue
