// The vq family on CPU, for kexue_kernels/vq/cpu_*.py: they allocate and check.
#include <pybind11/pybind11.h>

#include "vq/code_sums.h"
#include "vq/nearest_codebook_threads.h"
#include "vq/vector_quantize_threads.h"

namespace py = pybind11;

namespace kexue {
namespace {

// Addresses come as integers, arrays as (address, *strides).
template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

int64_t item(const py::tuple& values, size_t i) {
  if (i >= values.size()) throw py::value_error("a tuple is too short");
  return values[i].cast<int64_t>();
}

int64_t item_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// The h-th matrix of [H, rows, d].
MatrixView matrix(const py::tuple& x, int64_t h, DType dtype) {
  return {pointer<const char>(item(x, 0)) + h * item(x, 1) * item_bytes(dtype), item(x, 2),
          item(x, 3)};
}

void nearest_codebook(int threads, int dtype_code, int metric, bool exact, int64_t H, int64_t N,
                      int64_t K, int64_t d, const py::tuple& x, const py::tuple& codebook,
                      uintptr_t indices) {
  const DType dtype = static_cast<DType>(dtype_code);
  for (int64_t h = 0; h < H; ++h) {
    const NearestCodebook call{dtype,
                               static_cast<Metric>(metric),
                               exact,
                               N,
                               K,
                               d,
                               matrix(x, h, dtype),
                               matrix(codebook, h, dtype),
                               pointer<int64_t>(indices) + h * N};
    py::gil_scoped_release unlocked;
    nearest_codebook_on_threads(call, threads);
  }
}

// x [N, d] and codebook [K, d] contiguous
VectorQuantize vector_quantize(DType dtype, int64_t N, int64_t K, int64_t d, uintptr_t x,
                               uintptr_t codebook, uintptr_t indices) {
  return {dtype,
          N,
          K,
          d,
          {pointer(x), d, 1},
          {pointer(codebook), d, 1},
          pointer<const int64_t>(indices)};
}

float forward(int threads, int dtype, int64_t N, int64_t K, int64_t d, uintptr_t x,
              uintptr_t codebook, uintptr_t indices, uintptr_t quantized) {
  const auto call = vector_quantize(static_cast<DType>(dtype), N, K, d, x, codebook, indices);
  py::gil_scoped_release unlocked;
  return vector_quantize_on_threads(call, pointer(quantized), threads);
}

void backward(int threads, int dtype, int64_t N, int64_t K, int64_t d, const py::tuple& grad,
              uintptr_t x, uintptr_t codebook, uintptr_t indices, int gradient, double scale_x,
              double scale_c, uintptr_t grad_x, uintptr_t grad_codebook) {
  const VectorQuantizeBackward call{
      vector_quantize(static_cast<DType>(dtype), N, K, d, x, codebook, indices),
      {pointer(item(grad, 0)), item(grad, 1), item(grad, 2)},
      static_cast<Gradient>(gradient),
      0.0,
      pointer(grad_x)};
  py::gil_scoped_release unlocked;
  vector_quantize_on_threads(call, scale_x, scale_c, pointer(grad_codebook), threads);
}

void statistics(int threads, int dtype, int64_t N, int64_t K, int64_t d, uintptr_t x,
                uintptr_t indices, uintptr_t counts, uintptr_t sums) {
  py::gil_scoped_release unlocked;
  codebook_statistics_on_threads(static_cast<DType>(dtype), {pointer(x), d, 1},
                                 pointer<const int64_t>(indices), N, K, d, pointer<int64_t>(counts),
                                 pointer<float>(sums), threads);
}

}  // namespace

void bind_vq(py::module_& m) {
  m.def("nearest_codebook", &nearest_codebook);
  m.def("vector_quantize_forward", &forward);
  m.def("vector_quantize_backward", &backward);
  m.def("codebook_statistics", &statistics);
}

}  // namespace kexue
