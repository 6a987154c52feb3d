// The mla family on CPU, for kexue_kernels/mla/cpu_*.py: they allocate and check.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "mla/mla_attention_matmul.h"
#include "mla/mla_attention_threads.h"
#include "mla/mla_cache_append_threads.h"
#include "mla/mla_decode_threads.h"

namespace py = pybind11;

namespace kexue {
namespace {

// Addresses come as integers (0: none), arrays as (address, *strides).
template <class T = void>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

using Array2 = std::array<int64_t, 3>;
using Array3 = std::array<int64_t, 4>;
using Array4 = std::array<int64_t, 5>;

LatentPages latent_pages(const Array3& pages, int64_t block_size) {
  return {pointer(pages[0]), block_size, pages[1], pages[2], pages[3]};
}

// False: an id, a length or a slot is out of reach, and nothing was done.
bool decode(int threads, int dtype, const std::array<int64_t, 4>& sizes, int64_t head_dim_v,
            double scale, bool causal, int64_t num_splits, const Array4& q, const Array3& pages,
            int64_t num_blocks, int64_t block_size, int64_t table, int64_t blocks, int64_t lengths,
            int64_t out, int64_t lse) {
  const auto [B, Tq, H, width] = sizes;
  const MlaDecode call{static_cast<DType>(dtype),
                       B,
                       Tq,
                       H,
                       width,
                       head_dim_v,
                       float(scale),
                       causal,
                       {pointer(q[0]), q[1], q[2], q[3], q[4]},
                       latent_pages(pages, block_size),
                       pointer<const int32_t>(table),
                       blocks,
                       pointer<const int32_t>(lengths),
                       pointer(out),
                       pointer<float>(lse)};
  py::gil_scoped_release unlocked;
  if (!mla_decode_in_reach(call, num_blocks)) return false;
  mla_decode_on_threads(call, num_splits, threads);
  return true;
}

TokenRows token_rows(int dtype, const Array2& x) {
  return {static_cast<DType>(dtype), pointer(x[0]), x[1], x[2]};
}

bool append(int threads, int dtype, const Array2& latent, int64_t dc, const Array2& key,
            int64_t dr, const Array3& pages, int64_t num_blocks, int64_t block_size, int64_t slots,
            int64_t T, int weight_dtype, const Array2& weight, double eps, int cos_dtype,
            const Array2& cos, int sin_dtype, const Array2& sin, bool interleaved) {
  const MlaCacheAppend call{static_cast<DType>(dtype),
                            T,
                            dc,
                            dr,
                            token_rows(dtype, latent),
                            token_rows(dtype, key),
                            token_rows(weight_dtype, weight),
                            token_rows(cos_dtype, cos),
                            token_rows(sin_dtype, sin),
                            float(eps),
                            interleaved,
                            latent_pages(pages, block_size),
                            num_blocks,
                            pointer<const int64_t>(slots)};
  py::gil_scoped_release unlocked;
  if (!mla_cache_append_in_reach(call)) return false;
  mla_cache_append_on_threads(call, threads);
  return true;
}

MlaHeads heads(const Array3& x) { return {pointer(x[0]), x[1], x[2], x[3]}; }
MlaFloats floats(const Array2& x) { return {pointer<float>(x[0]), x[1], x[2]}; }

// sizes: T, H, dk, dr, dv. data: q_nope, q_rope, out. expanded: k, key, v.
MlaAttention attention_of(int dtype, const std::array<int64_t, 5>& sizes, bool causal,
                          const std::vector<int64_t>& bounds, const std::array<Array3, 3>& data,
                          const std::array<Array2, 3>& expanded, int64_t lse) {
  const auto [T, H, dk, dr, dv] = sizes;
  return {static_cast<DType>(dtype),
          T,
          H,
          dk,
          dr,
          dv,
          causal,
          bounds.data(),
          int64_t(bounds.size()) - 1,
          heads(data[0]),
          heads(data[1]),
          floats(expanded[0]),
          floats(expanded[1]),
          floats(expanded[2]),
          heads(data[2]),
          pointer<float>(lse)};
}

void attention(int threads, int dtype, const std::array<int64_t, 5>& sizes, bool causal,
               const std::vector<int64_t>& bounds, const std::array<Array3, 3>& data,
               const std::array<Array2, 3>& expanded, int64_t lse) {
  py::gil_scoped_release unlocked;
  mla_attention_on_threads(
      attention_of(dtype, sizes, causal, bounds, data, expanded, lse), threads);
}

// gradients: of out, q_nope, q_rope. d_expanded: of k, key, v.
void attention_backward(int threads, int dtype, const std::array<int64_t, 5>& sizes, bool causal,
                        const std::vector<int64_t>& bounds, const std::array<Array3, 3>& data,
                        const std::array<Array2, 3>& expanded, int64_t lse,
                        const std::array<Array3, 3>& gradients,
                        const std::array<Array2, 3>& d_expanded) {
  const MlaAttentionGradient gradient{heads(gradients[0]),   heads(gradients[1]),
                                      heads(gradients[2]),   floats(d_expanded[0]),
                                      floats(d_expanded[1]), floats(d_expanded[2])};
  py::gil_scoped_release unlocked;
  mla_attention_backward_on_threads(
      attention_of(dtype, sizes, causal, bounds, data, expanded, lse), gradient, threads);
}

// sizes: count, rows, columns, depth. c's strides: matrix, row.
void matmul(int threads, const std::array<int64_t, 4>& sizes, double factor, const Array3& a,
            const Array3& b, const Array2& c, bool add) {
  py::gil_scoped_release unlocked;
  const auto [count, rows, columns, depth] = sizes;
  mla_matmul_on_threads({count,
                         rows,
                         columns,
                         depth,
                         float(factor),
                         add,
                         {pointer<const float>(a[0]), a[1], a[2], a[3]},
                         {pointer<const float>(b[0]), b[1], b[2], b[3]},
                         {pointer<float>(c[0]), c[1], c[2]}},
                        threads);
}

}  // namespace

void bind_mla(py::module_& m) {
  m.def("mla_decode", &decode);
  m.def("mla_cache_append", &append);
  m.def("mla_matmul", &matmul);
  m.def("mla_attention", &attention);
  m.def("mla_attention_backward", &attention_backward);
}

}  // namespace kexue
