// linear_scan's CUDA part of the extension for a CPU compiler, bindings included, its look-back
// alone, and how blocks are scheduled.
#include "scan/bindings_cuda.cpp"
#include "scan/linear_scan_cuda.cu"

namespace kexue {

void selective::bind_cuda(py::module_&) {}  // selective_module.cpp has it

namespace {

struct LookBackArgs {
  Chain chain;
  Tile tile;
  const void* first;
  void* state;
};

template <DType T>
void look_back_kernel(LookBackArgs args) {
  auto& shared = block_shared<Shared<T>>();
  look_back<T, true>(args.chain, args.tile, args.first, kTileChannels<T>, shared);
  each_channel<T>([&](int c) { static_cast<StateOf<T>*>(args.state)[c] = shared.state[c]; });
}

// The state [channels of a tile] that enters chunk `chunk` of a sequence that `first` enters,
// whose chunks have published flags [chunks] and records [chunks, channels of a tile].
void look_back_alone(int dtype, int warps, int64_t chunk, Address flags, Address records,
                     Address first, Address state) {
  LookBackArgs args = {};
  args.chain = {nullptr, pointer<uint32_t>(flags), pointer(records)};
  args.tile.chunk = args.tile.slot = chunk;
  args.first = pointer(first);
  args.state = pointer(state);
  dispatch(DType(dtype), [&]<DType T>() {
    launch("look_back", look_back_kernel<T>, 1, warps * kWarp, nullptr, args);
  });
}

}  // namespace
}  // namespace kexue

PYBIND11_MODULE(kexue_emulated, m) {
  kexue::bind_scan_cuda(m);
  m.attr("WINDOW") = kexue::kWindow;
  m.def("look_back", &kexue::look_back_alone);
  m.def("schedule", [](int blocks_at_once, uint64_t seed) {
    kexue::emulation::schedule = {blocks_at_once, seed};
  });
}
