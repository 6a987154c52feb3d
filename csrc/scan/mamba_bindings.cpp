// What a Mamba mixer does on CPU, for kexue_kernels/scan/cpu_mamba.py: it allocates and checks.
#include <pybind11/pybind11.h>

#include "scan/causal_conv_threads.h"
#include "scan/mamba_step_threads.h"

namespace py = pybind11;

namespace kexue {
namespace {

// Addresses come as integers (0: none).
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

Layer layer(const py::tuple& x) { return {pointer(item(x, 0)), pointer(item(x, 1))}; }

// state: (address, dtype, *strides) of [batch, d, n]
StateUpdate update_of(int64_t batch, int64_t d, int64_t n, const py::tuple& state, uintptr_t A,
                      uintptr_t D, uintptr_t dt_bias) {
  StateUpdate update{};
  update.batch = batch;
  update.H = update.G = 1;
  update.P = d;
  update.n = n;
  update.softplus = true;
  update.state_dtype = static_cast<DType>(item(state, 1));
  update.state = {pointer(item(state, 0)), {item(state, 2), 0, item(state, 3), item(state, 4)}};
  update.A = {pointer(A), {0, n, 1, 0}};
  update.D = {pointer(D), {0, 1, 0, 0}};
  update.dt_bias = {pointer(dt_bias), {0, 1, 0, 0}};
  return update;
}

// sizes: batch, dim, d, n, rank, taps, kept inputs; a layer: (weight, bias)
void step(int threads, int dtype, const py::tuple& sizes, uintptr_t x, const py::tuple& window,
          const py::tuple& state, const py::tuple& in_proj, const py::tuple& x_proj,
          const py::tuple& dt_proj, const py::tuple& out_proj, uintptr_t taps,
          uintptr_t conv_bias, uintptr_t A, uintptr_t D, uintptr_t dt_bias, bool normalised,
          float eps, uintptr_t out) {
  const int64_t batch = item(sizes, 0), d = item(sizes, 2), n = item(sizes, 3);
  const MambaStep call{batch,
                       item(sizes, 1),
                       d,
                       n,
                       item(sizes, 4),
                       item(sizes, 5),
                       item(sizes, 6),
                       static_cast<DType>(dtype),
                       pointer<const float>(x),
                       strided(window),
                       layer(in_proj),
                       layer(x_proj),
                       layer(dt_proj),
                       layer(out_proj),
                       pointer<const float>(taps),
                       pointer<const float>(conv_bias),
                       update_of(batch, d, n, state, A, D, dt_bias),
                       normalised,
                       eps,
                       pointer(out)};
  py::gil_scoped_release unlocked;
  mamba_step_on_threads(call, threads);
}

// sizes: B, L, d, K
void convolve(int threads, int dtype, const py::tuple& sizes, bool silu, const py::tuple& x,
              const py::tuple& window, uintptr_t taps, uintptr_t bias, uintptr_t y) {
  const CausalConv call{item(sizes, 0),
                        item(sizes, 1),
                        item(sizes, 2),
                        item(sizes, 3),
                        static_cast<DType>(dtype),
                        silu,
                        strided(x),
                        strided(window),
                        pointer<const float>(taps),
                        pointer<const float>(bias),
                        pointer(y)};
  py::gil_scoped_release unlocked;
  causal_conv_on_threads(call, threads);
}

}  // namespace

void bind_mamba(py::module_& m) {
  m.def("mamba_step", &step);
  m.def("causal_conv", &convolve);
}

}  // namespace kexue
