#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "scan/linear_scan_cuda.h"

namespace py = pybind11;

namespace kexue {

namespace selective {
void bind_cuda(py::module_&);
}

namespace {

using Address = uintptr_t;
using Array = std::array<int64_t, 4>;  // address, strides in elements of batch, step and channel
using Sizes = std::array<int64_t, 4>;  // B, L, D, sequences

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Strided strided(const Array& x) { return {pointer(Address(x[0])), x[1], x[2], x[3]}; }

LinearScanShape shape_of(const Sizes& sizes, Address cu_seqlens, bool reverse) {
  const auto [B, L, D, sequences] = sizes;
  return {B, L, D, sequences, pointer<const int64_t>(cu_seqlens), reverse};
}

std::pair<int64_t, int64_t> cut(const Sizes& sizes, Address cu_seqlens, int dtype, bool backward,
                                int warps) {
  const auto found =
      linear_scan_cut(shape_of(sizes, cu_seqlens, false), DType(dtype), backward, warps);
  return {found.chunks, found.workspace};
}

void forward(const Sizes& sizes, Address cu_seqlens, bool reverse, int dtype, const Array& a,
             const Array& b, Address h, Address initial, Address final, int warps,
             Address workspace, Address stream) {
  const LinearScanForward call = {shape_of(sizes, cu_seqlens, reverse),
                                  strided(a),
                                  strided(b),
                                  pointer(h),
                                  pointer(initial),
                                  pointer(final)};
  linear_scan_forward_cuda(call, DType(dtype), warps, pointer(workspace), pointer(stream));
}

void backward(const Sizes& sizes, Address cu_seqlens, bool reverse, int dtype, const Array& a,
              const Array& h, const Array& grad_h, Address initial, Address grad_final,
              Address grad_b, Address grad_a, bool partial, Address grad_initial, int warps,
              Address workspace, Address stream) {
  const LinearScanBackward call = {shape_of(sizes, cu_seqlens, reverse),
                                   strided(a),
                                   strided(h),
                                   strided(grad_h),
                                   pointer(initial),
                                   pointer(grad_final),
                                   pointer(grad_b),
                                   pointer(grad_a),
                                   pointer(grad_initial)};
  linear_scan_backward_cuda(call, DType(dtype), warps, partial, pointer(workspace),
                            pointer(stream));
}

}  // namespace

void bind_scan_cuda(py::module_& m) {
  selective::bind_cuda(m);
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("linear_scan_cuda_steps_per_warp", &linear_scan_steps_per_warp, py::arg("backward"));
  m.def("linear_scan_cuda_cut", &cut, "(chunks, bytes of workspace)", py::arg("sizes"),
        py::arg("cu_seqlens"), py::arg("dtype"), py::arg("backward"), py::arg("warps"));
  m.def("linear_scan_cuda_forward", &forward, unlocked, py::arg("sizes"), py::arg("cu_seqlens"),
        py::arg("reverse"), py::arg("dtype"), py::arg("a"), py::arg("b"), py::arg("h"),
        py::arg("initial"), py::arg("final"), py::arg("warps"), py::arg("workspace"),
        py::arg("stream"));
  m.def("linear_scan_cuda_backward", &backward, unlocked, py::arg("sizes"),
        py::arg("cu_seqlens"), py::arg("reverse"), py::arg("dtype"), py::arg("a"), py::arg("h"),
        py::arg("grad_h"), py::arg("initial"), py::arg("grad_final"), py::arg("grad_b"),
        py::arg("grad_a"), py::arg("partial"), py::arg("grad_initial"), py::arg("warps"),
        py::arg("workspace"), py::arg("stream"));
}

}  // namespace kexue
