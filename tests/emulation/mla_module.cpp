// mla_decode's CUDA part of the extension for a CPU compiler, bindings included, and the
// arithmetic it rests on.
#include "mla/bindings_cuda.cpp"
#include "mla/mla_decode_cuda.cu"

PYBIND11_MODULE(kexue_mla_emulated, m) {
  using namespace kexue;
  bind_mla_cuda(m);
  py::dict info;
  info["archs"] = "sm_80 sm_90a";
  m.attr("build_info") = info;
  m.attr("SHARED_BYTES") = sizeof(mla::DecodeShared) + 1024;
  m.def("schedule", [](uint64_t seed) { emulation::schedule.seed = seed; });

  m.def("tile_offset", &hopper::tile_offset);
  m.def("across_channels", &hopper::across_channels);
  m.def("across_rows", &hopper::across_rows);
  m.def("fragment", [](int thread, int i) {
    return std::pair(hopper::fragment_row(thread, i), hopper::fragment_column(thread, i));
  });
  m.def("piece_rows", &mla::piece_rows);

  using Sizes = std::array<int, 7>;
  const auto sizes_of = [](const Sizes& s, bool causal) {
    return mla::DecodeSizes{s[0], s[1], s[2], s[3], s[4], s[5], s[6], causal};
  };
  m.def("work", [=](const Sizes& sizes, int64_t index, const std::vector<int>& seqlens) {
    const mla::Work work = mla::work_of(sizes_of(sizes, true), index, seqlens.data());
    return std::array{work.b, work.split, work.query, work.length, work.begin, work.end};
  });
  m.def("visible_end", [=](const Sizes& sizes, bool causal, const std::array<int, 6>& w, int m) {
    return mla::visible_end(sizes_of(sizes, causal), {w[0], w[1], w[2], w[3], w[4], w[5]}, m);
  });
  m.def("place", [=](const Sizes& sizes, const std::vector<int>& table, int b, int key) {
    const mla::Place place = mla::place_of(sizes_of(sizes, true), table.data(), b, key);
    return std::pair(place.page, place.row);
  });
}
