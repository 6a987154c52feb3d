// The module kexue_kernels._C: pointers, sizes, strides and a stream come in; nothing is owned.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"
#include "common/isa.h"

namespace py = pybind11;

namespace kexue {

// Equal to INTERFACE in kexue_kernels/_extension.py; both rise with every change of a signature.
constexpr int kInterface = 5;

#define KEXUE_DECLARE(family) void bind_##family(py::module_& m);
#define KEXUE_DECLARE_CUDA(family) void bind_##family##_cuda(py::module_& m);
KEXUE_FAMILIES(KEXUE_DECLARE)
KEXUE_CUDA_FAMILIES(KEXUE_DECLARE_CUDA)

}  // namespace kexue

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of kexue_kernels; call them through the package's functions.";
  m.attr("interface") = kexue::kInterface;
  m.attr("has_cuda") = bool(KEXUE_WITH_CUDA);

  kexue::cpu_isa();  // a KEXUE_CPU_ISA that can't be served is an ImportError, here

  py::dict info;
  info["compiler"] = KEXUE_COMPILER;
  info["openmp"] = KEXUE_OPENMP;  // empty: not found
  info["cuda"] = KEXUE_CUDA_VERSION;
  info["archs"] = KEXUE_CUDA_ARCHS;
  m.attr("build_info") = info;

  m.def("cpu_isa", [] { return kexue::name(kexue::cpu_isa()); });
  m.def("cpu_isas", &kexue::supported_isas, "What this build and this machine both have.");
  m.def("set_cpu_isa", &kexue::set_cpu_isa, py::arg("name"));

#define KEXUE_BIND(family) kexue::bind_##family(m);
#define KEXUE_BIND_CUDA(family) kexue::bind_##family##_cuda(m);
  KEXUE_FAMILIES(KEXUE_BIND)
  KEXUE_CUDA_FAMILIES(KEXUE_BIND_CUDA)
}
