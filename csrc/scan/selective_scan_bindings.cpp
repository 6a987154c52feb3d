// selective_scan and selective_state_update on CPU, for kexue_kernels/scan/cpu_selective_*.py:
// they allocate and check.
#include <pybind11/pybind11.h>

#include "scan/selective_scan_threads.h"
#include "scan/selective_state_update_threads.h"

namespace py = pybind11;

namespace kexue {
namespace {

// Addresses come as integers (0: none), arrays as (address, *strides).
template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

int64_t item(const py::tuple& values, size_t i) {
  if (i >= values.size()) throw py::value_error("a tuple is too short");
  return values[i].cast<int64_t>();
}

Strided strided(const py::tuple& x) {
  return {pointer(item(x, 0)), item(x, 1), item(x, 2), item(x, 3)};
}

// per step (address, groups, *strides); time-invariant (address,)
Projection projection(const py::tuple& x) {
  if (x.size() == 1) return {pointer(item(x, 0)), false, 1, 0, 0, 0, 0};
  return {pointer(item(x, 0)), true, item(x, 1), item(x, 2), item(x, 3), item(x, 4), item(x, 5)};
}

// (shape, dtype, complex, softplus, u, delta, z, A, B, C, D, delta_bias, initial)
SelectiveInputs inputs_of(const py::tuple& in) {
  if (in.size() != 13) throw py::value_error("expected 13 inputs");
  const py::tuple shape = in[0];  // batch, L, d, n, sequences, cu_seqlens, chunk
  const auto array = [&](size_t i) { return in[i].cast<py::tuple>(); };
  return {{item(shape, 0), item(shape, 1), item(shape, 2), item(shape, 3), item(shape, 4),
           pointer<const int64_t>(item(shape, 5)), item(shape, 6)},
          static_cast<DType>(item(in, 1)),
          in[2].cast<bool>(),
          in[3].cast<bool>(),
          strided(array(4)),
          strided(array(5)),
          strided(array(6)),
          pointer(item(in, 7)),
          projection(array(8)),
          projection(array(9)),
          pointer<const float>(item(in, 10)),
          pointer<const float>(item(in, 11)),
          pointer(item(in, 12))};
}

void forward(int threads, const py::tuple& inputs, uintptr_t out, uintptr_t final,
             uintptr_t checkpoints) {
  const SelectiveForward call{inputs_of(inputs), pointer(out), pointer(final),
                              pointer(checkpoints)};
  py::gil_scoped_release unlocked;
  selective_scan_on_threads(call, threads);
}

// gradients: addresses of u, delta, A, B, C, D, z, delta_bias, initial
void backward(int threads, const py::tuple& inputs, const py::tuple& grad_out,
              uintptr_t grad_final, uintptr_t checkpoints, const py::tuple& gradients) {
  const auto to = [&](size_t i) { return pointer(item(gradients, i)); };
  const SelectiveBackward call{inputs_of(inputs),
                               strided(grad_out),
                               pointer(grad_final),
                               pointer(checkpoints),
                               to(0),
                               to(1),
                               to(6),
                               to(2),
                               to(3),
                               to(4),
                               static_cast<float*>(to(5)),
                               static_cast<float*>(to(7)),
                               to(8)};
  py::gil_scoped_release unlocked;
  selective_scan_on_threads(call, threads);
}

StateUpdateArray array_of(const py::tuple& x) {
  StateUpdateArray array{pointer(item(x, 0)), {}};
  for (size_t i = 1; i < x.size() && i <= 4; ++i) array.strides[i - 1] = item(x, i);
  return array;
}

// x, dt, z: [batch, H, P]; A: [H, P, n]; B, C: [batch, G, n]; D, dt_bias: [H, P]
void update(int threads, int state_dtype, int dtype, const py::tuple& sizes, bool softplus,
            uintptr_t indices, uintptr_t out, const py::tuple& state, const py::tuple& x,
            const py::tuple& dt, const py::tuple& A, const py::tuple& B, const py::tuple& C,
            const py::tuple& D, const py::tuple& z, const py::tuple& dt_bias) {
  const StateUpdate call{item(sizes, 0),
                         item(sizes, 1),
                         item(sizes, 2),
                         item(sizes, 3),
                         item(sizes, 4),
                         static_cast<DType>(state_dtype),
                         static_cast<DType>(dtype),
                         softplus,
                         array_of(state),
                         array_of(x),
                         array_of(dt),
                         array_of(A),
                         array_of(B),
                         array_of(C),
                         array_of(D),
                         array_of(z),
                         array_of(dt_bias),
                         pointer<const int64_t>(indices),
                         pointer(out)};
  py::gil_scoped_release unlocked;
  state_update_on_threads(call, threads);
}

}  // namespace

void bind_selective_scan(py::module_& m) {
  m.def("selective_scan_forward", &forward);
  m.def("selective_scan_backward", &backward);
  m.def("selective_state_update", &update);
}

}  // namespace kexue
