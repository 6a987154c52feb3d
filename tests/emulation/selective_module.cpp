// selective_scan's CUDA part of the extension for a CPU compiler, bindings included.
#include "scan/selective_scan_backward_cuda.cu"
#include "scan/selective_scan_bindings_cuda.cpp"
#include "scan/selective_scan_cuda.cu"
#include "scan/selective_scan_reverse_cuda.cu"
#include "scan/selective_state_update_cuda.cu"

PYBIND11_MODULE(kexue_selective_emulated, m) {
  kexue::selective::bind_cuda(m);
  m.def("schedule", [](int blocks_at_once, uint64_t seed) {
    kexue::emulation::schedule = {blocks_at_once, seed};
  });
}
