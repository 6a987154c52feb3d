#include "scan/mamba_step_threads.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "common/isa.h"
#include "common/sequences.h"

namespace kexue {
namespace {

constexpr int64_t kLeastWork = 128 * 1024;  // weights for a thread to be worth its start
constexpr int64_t kGrain = 32;              // rows: whole cache lines, and whole registers

using Stage = void (*)(const MambaStep&, const MambaStepRoom&, int64_t, int64_t);

void normalise(float* x, int64_t count, float eps) {
  double squares = 0;
  for (int64_t i = 0; i < count; ++i) squares += double(x[i]) * x[i];
  const double scale = 1 / std::sqrt(squares / count + eps);
  for (int64_t i = 0; i < count; ++i) x[i] = float(x[i] * scale);
}

// [batch, 1, count] of float, `step` apart.
StateUpdateArray rows_of(float* data, int64_t step) { return {data, {step, 0, 1, 0}}; }

}  // namespace

void mamba_step_on_threads(MambaStep call, int threads) {
  const int64_t batch = call.batch, d = call.d, width = call.rank + 2 * call.n;
  std::vector<float> memory(batch * (4 * d + width));
  float* at = memory.data();
  const auto take = [&](int64_t columns) { return std::exchange(at, at + batch * columns); };
  const MambaStepRoom room{take(d), take(d), take(d), take(d), take(width)};

  StateUpdate& update = call.update;
  update.dtype = DType::f32;
  update.x = rows_of(room.u, d);
  update.z = rows_of(room.z, d);
  update.dt = rows_of(room.dt, d);
  update.B = {room.selected + call.rank, {width, 0, 1, 0}};
  update.C = {room.selected + call.rank + call.n, {width, 0, 1, 0}};
  update.out = room.y;

  const auto run = [&](Stage stage, int64_t rows, int64_t weights) {
    const int64_t grains = (rows + kGrain - 1) / kGrain;
    const int64_t jobs =
        std::clamp<int64_t>(weights / kLeastWork, 1, std::min<int64_t>(threads, grains));
    run_jobs(jobs, [&](int64_t i) {
      const auto cut = [&](int64_t j) { return std::min(rows, grains * j / jobs * kGrain); };
      stage(call, room, cut(i), cut(i + 1));
    });
  };
  run(KEXUE_FOR_THIS_CPU(mamba_step_enter), d, 2 * d * call.dim);
  run(KEXUE_FOR_THIS_CPU(mamba_step_select), width, width * d);
  for (int64_t b = 0; call.normalised && b < batch; ++b) {
    float* selected = room.selected + b * width;
    normalise(selected, call.rank, call.eps);
    normalise(selected + call.rank, call.n, call.eps);
    normalise(selected + call.rank + call.n, call.n, call.eps);
  }
  run(KEXUE_FOR_THIS_CPU(mamba_step_update), d, d * (call.rank + 4 * call.n));
  run(KEXUE_FOR_THIS_CPU(mamba_step_leave), call.dim, call.dim * d);
}

}  // namespace kexue
