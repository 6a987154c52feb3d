#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "scan/selective_scan_cuda.h"
#include "scan/selective_state_update_cuda.h"

namespace py = pybind11;

namespace kexue::selective {
namespace {

using Address = uintptr_t;
template <int N>
using Numbers = std::array<int64_t, N>;

template <class T = void>
T* at(int64_t address) {
  return reinterpret_cast<T*>(Address(address));
}

Strided strided(const Numbers<4>& x) { return {at(x[0]), x[1], x[2], x[3]}; }

Matrix matrix(const Numbers<6>& x) { return {at(x[0]), x[1], x[2], x[3], x[4], x[5], false}; }

using Given = std::tuple<Numbers<6>,              // batch, L, d, n, chunk, sequences
                         Numbers<4>,              // split, slots, rows, run
                         Address, bool,           // cu_seqlens, softplus
                         Numbers<4>, Numbers<4>,  // u, delta: address and strides
                         Numbers<4>,              // z
                         Address,                 // A
                         Numbers<6>, Numbers<6>,  // B, C: address, strides, channels of a group
                         Address, Address,        // D, bias
                         Address>;                // initial

Inputs inputs(const Given& given) {
  const auto& [sizes, cut, cu_seqlens, softplus, u, delta, z, A, B, C, D, bias, initial] = given;
  Inputs in = {};
  in.batch = sizes[0], in.L = sizes[1], in.d = sizes[2], in.n = sizes[3];
  in.chunk = sizes[4], in.sequences = sizes[5];
  in.cut = {cut[0], cut[1], cut[2], cut[3], 0};
  in.cu_seqlens = at<const int64_t>(cu_seqlens);
  in.softplus = softplus;
  in.u = strided(u), in.delta = strided(delta), in.z = strided(z);
  in.A = at(A), in.B = matrix(B), in.C = matrix(C);
  in.D = at<const float>(D), in.bias = at<const float>(bias);
  in.initial = at(initial);
  return in;
}

void forward(const Given& given, int dtype, bool complex, Address out, Address sums,
             Address final, Address checkpoints, Address entering, Address local, Address time,
             Address stream) {
  ForwardArgs args = {};
  args.in = inputs(given);
  args.out = at(out), args.sums = at<float>(sums), args.final = at(final);
  args.checkpoints = at(checkpoints), args.entering = at(entering), args.local = at(local);
  args.time = at<float>(time);
  forward_cuda(args, DType(dtype), complex, at(stream));
}

void backward(const Given& given, int dtype, bool complex, const Numbers<4>& grad_out,
              int64_t first_state, Address checkpoints, Address grad_final, Address entering,
              Address u, Address delta, Address z, Address A, Address B, Address C, Address D,
              Address bias, Address initial, Address sums, Address stream) {
  BackwardArgs args = {};
  args.in = inputs(given);
  args.in.first_state = first_state;
  args.grad_out = strided(grad_out);
  args.checkpoints = at(checkpoints), args.grad_final = at(grad_final);
  args.entering = at(entering);
  args.u = at(u), args.delta = at(delta), args.z = at(z);
  args.A = at(A), args.B = at(B), args.C = at(C);
  args.D = at<float>(D), args.bias = at<float>(bias);
  args.initial = at(initial), args.sums = at<float>(sums);
  backward_cuda(args, DType(dtype), complex, at(stream));
}

void reverse(const Given& given, int dtype, bool complex, const Numbers<4>& grad_out,
             Address local, Address time, Address stream) {
  reverse_cuda({inputs(given), strided(grad_out), at(local), at<float>(time)}, DType(dtype),
               complex, at(stream));
}

void chain(const Given& given, bool complex, Address firsts, Address states, Address time,
           bool backwards, Address stream) {
  chain_cuda({inputs(given), at(firsts), at(states), at<float>(time), backwards}, complex,
             at(stream));
}

template <int N>
Array<N> array(const Numbers<N + 1>& x) {  // address, strides
  Array<N> a = {at(x[0]), {}};
  for (int i = 0; i < N; ++i) a.stride[i] = x[i + 1];
  return a;
}

void update(const Numbers<6>& sizes, int dtype, int state_dtype, bool softplus,
            const Numbers<5>& state, const Numbers<4>& x, const Numbers<4>& dt,
            const Numbers<4>& A, const Numbers<4>& B, const Numbers<4>& C, const Numbers<3>& D,
            const Numbers<4>& z, const Numbers<3>& bias, Address indices, Address out,
            Address stream) {
  UpdateArgs args = {};
  args.batch = sizes[0], args.heads = sizes[1], args.P = sizes[2], args.n = sizes[3];
  args.groups = sizes[4], args.states = sizes[5];
  args.dtype = DType(dtype), args.state_dtype = DType(state_dtype), args.softplus = softplus;
  args.state = array<4>(state), args.x = array<3>(x), args.dt = array<3>(dt);
  args.z = array<3>(z), args.A = array<3>(A), args.B = array<3>(B), args.C = array<3>(C);
  args.D = array<2>(D), args.bias = array<2>(bias);
  args.indices = at<const int64_t>(indices), args.out = at(out);
  update_cuda(args, at(stream));
}

}  // namespace

void bind_cuda(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("selective_scan_cuda_limits", [](bool complex) {
    const Limits found = limits(complex);
    return py::make_tuple(found.forward_channels, found.backward_channels, found.states);
  });
  m.def("selective_scan_cuda_forward", &forward, unlocked, py::arg("given"), py::arg("dtype"),
        py::arg("complex"), py::arg("out"), py::arg("sums"), py::arg("final"),
        py::arg("checkpoints"), py::arg("entering"), py::arg("local"), py::arg("time"),
        py::arg("stream"));
  m.def("selective_scan_cuda_backward", &backward, unlocked, py::arg("given"), py::arg("dtype"),
        py::arg("complex"), py::arg("grad_out"), py::arg("first_state"), py::arg("checkpoints"),
        py::arg("grad_final"), py::arg("entering"), py::arg("u"), py::arg("delta"),
        py::arg("z"), py::arg("A"), py::arg("B"), py::arg("C"), py::arg("D"), py::arg("bias"),
        py::arg("initial"), py::arg("sums"), py::arg("stream"));
  m.def("selective_scan_cuda_reverse", &reverse, unlocked, py::arg("given"), py::arg("dtype"),
        py::arg("complex"), py::arg("grad_out"), py::arg("local"), py::arg("time"),
        py::arg("stream"));
  m.def("selective_scan_cuda_chain", &chain, unlocked, py::arg("given"), py::arg("complex"),
        py::arg("firsts"), py::arg("states"), py::arg("time"), py::arg("backwards"),
        py::arg("stream"));
  m.def("selective_state_update_cuda", &update, unlocked,
        "sizes: batch, heads, P, n, groups, states", py::arg("sizes"), py::arg("dtype"),
        py::arg("state_dtype"), py::arg("softplus"), py::arg("state"), py::arg("x"),
        py::arg("dt"), py::arg("A"), py::arg("B"), py::arg("C"), py::arg("D"), py::arg("z"),
        py::arg("bias"), py::arg("indices"), py::arg("out"), py::arg("stream"));
}

}  // namespace kexue::selective
