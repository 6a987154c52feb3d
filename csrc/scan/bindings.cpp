// linear_scan on CPU, for kexue_kernels/scan/cpu_linear_scan.py: it allocates and checks.
#include <pybind11/pybind11.h>

#include "scan/linear_scan_threads.h"

namespace py = pybind11;

namespace kexue {
namespace {

// Addresses come as integers (0: none), strides as Tensor.stride() gives them.
template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Strided strided(uintptr_t address, const py::tuple& strides) {
  if (strides.size() != 3) throw py::value_error("expected strides of [B, L, D]");
  return {pointer(address), strides[0].cast<int64_t>(), strides[1].cast<int64_t>(),
          strides[2].cast<int64_t>()};
}

void forward(int dtype, int threads, int64_t B, int64_t L, int64_t D, int64_t sequences,
             uintptr_t cu_seqlens, bool reverse, uintptr_t a, const py::tuple& a_strides,
             uintptr_t b, const py::tuple& b_strides, uintptr_t h, uintptr_t initial,
             uintptr_t final) {
  const LinearScanForward call{{B, L, D, sequences, pointer<const int64_t>(cu_seqlens), reverse},
                               strided(a, a_strides),
                               strided(b, b_strides),
                               pointer(h),
                               pointer(initial),
                               pointer(final)};
  py::gil_scoped_release unlocked;
  linear_scan_on_threads(call, static_cast<DType>(dtype), threads);
}

void backward(int dtype, int threads, int64_t B, int64_t L, int64_t D, int64_t sequences,
              uintptr_t cu_seqlens, bool reverse, uintptr_t a, const py::tuple& a_strides,
              uintptr_t h, const py::tuple& h_strides, uintptr_t grad_h,
              const py::tuple& grad_h_strides, uintptr_t initial, uintptr_t grad_final,
              uintptr_t grad_b, int grad_a_kind, uintptr_t grad_a, uintptr_t grad_initial) {
  const LinearScanBackward call{{B, L, D, sequences, pointer<const int64_t>(cu_seqlens), reverse},
                                strided(a, a_strides),
                                strided(h, h_strides),
                                strided(grad_h, grad_h_strides),
                                pointer(initial),
                                pointer(grad_final),
                                pointer(grad_b),
                                pointer(grad_a),
                                pointer(grad_initial)};
  py::gil_scoped_release unlocked;
  linear_scan_on_threads(call, static_cast<DType>(dtype), static_cast<GradA>(grad_a_kind), threads);
}

}  // namespace

void bind_selective_scan(py::module_& m);
void bind_mamba(py::module_& m);

void bind_scan(py::module_& m) {
  m.attr("linear_scan_tile_steps") = kTileSteps;
  m.def("linear_scan_forward", &forward);
  m.def("linear_scan_backward", &backward);
  bind_selective_scan(m);
  bind_mamba(m);
}

}  // namespace kexue
