#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "mla/mla_decode_cuda.h"

namespace py = pybind11;

namespace kexue {
namespace {

using Address = uintptr_t;

template <class T = void>
T* at(int64_t address) {
  return reinterpret_cast<T*>(Address(address));
}

void mla_decode(const std::array<int, 7>& sizes, bool causal, int dtype,
                const std::array<int64_t, 4>& q,      // address, strides of b, t, h
                const std::array<int64_t, 3>& pages,  // address, strides of block, row
                Address table, Address seqlens, Address out, Address lse, Address parts,
                Address part_lse, double softmax_scale, Address stream) {
  const auto [B, Tq, H, num_blocks, block_size, max_blocks, splits] = sizes;
  mla::DecodeCall call = {};
  call.sizes = {B, Tq, H, num_blocks, block_size, max_blocks, splits, causal};
  call.dtype = DType(dtype);
  call.q = at(q[0]), call.stride_qb = q[1], call.stride_qt = q[2], call.stride_qh = q[3];
  call.pages = at(pages[0]), call.stride_block = pages[1], call.stride_row = pages[2];
  call.table = at<const int32_t>(table), call.seqlens = at<const int32_t>(seqlens);
  call.out = at(out), call.lse = at<float>(lse);
  call.parts = at<float>(parts), call.part_lse = at<float>(part_lse);
  call.softmax_scale = softmax_scale;
  mla::mla_decode_cuda(call, at(stream));
}

}  // namespace

void bind_mla_cuda(py::module_& m) {
  m.def("mla_decode_cuda", &mla_decode, py::call_guard<py::gil_scoped_release>(),
        py::arg("sizes"), py::arg("causal"), py::arg("dtype"), py::arg("q"), py::arg("pages"),
        py::arg("table"), py::arg("seqlens"), py::arg("out"), py::arg("lse"), py::arg("parts"),
        py::arg("part_lse"), py::arg("softmax_scale"), py::arg("stream"));
}

}  // namespace kexue
