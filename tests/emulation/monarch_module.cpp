// monarch_matmul's CUDA part of the extension for a CPU compiler, bindings included, and the
// arithmetic it rests on.
#include "monarch/bindings_cuda.cpp"
#include "monarch/monarch_matmul_cuda.cu"

PYBIND11_MODULE(kexue_monarch_emulated, m) {
  using namespace kexue;
  hopper::emulation::zeros_outside = true;  // beyond the last row
  bind_monarch_cuda(m);
  py::dict info;
  info["archs"] = "sm_80 sm_90a";
  m.attr("build_info") = info;
  
  m.def("schedule", [](uint64_t seed) { emulation::schedule.seed = seed; });

  using Sizes = std::array<int, 7>;
  m.def("way", [](const Sizes& s, int cluster) -> std::string {
    const monarch::ClusterSizes sizes = {s[0], s[1], s[2], s[3], s[4], s[5], s[6], cluster};
    return can_stay(sizes) ? "resident" : can_stream(sizes) ? "streamed" : "";
  });
  m.def("shared_bytes", [](const Sizes& s, int cluster) {
    const monarch::ClusterSizes sizes = {s[0], s[1], s[2], s[3], s[4], s[5], s[6], cluster};
    return (can_stay(sizes) ? resident_bytes(sizes) : streamed_bytes(sizes)) + hopper::kAlignment;
  });
  m.def("input_of_unit", &monarch::input_of_unit);
  m.def("unit_offset", &hopper::unit_offset);
  m.def("across_units", &hopper::across_units);
}
