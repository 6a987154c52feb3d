#include "mla/mla_decode_threads.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "common/isa.h"
#include "mla/mla_decode_cpu.h"
#include "common/work.h"

namespace kexue {
namespace {

// Merging takes some 20 rows' time for every piece, and it takes a few pieces for every thread.
constexpr int64_t kLeastRows = 192, kManyRows = 528;  // of a piece
constexpr int64_t kPieces = 32, kManyPieces = 128;
constexpr int64_t kLanes = 8;            // queries that are as fast as fewer
constexpr int64_t kLeastWork = 1 << 18;  // multiply-adds for a thread to be worth its start

// Sequences cut into parts of `rows` rows, the same for all, and queries into tiles.
class Plan {
 public:
  Plan(const MlaDecode& call, int64_t num_splits)
      : tiles_(ceil_div(call.queries(), kMlaQueries)),
        tile_(ceil_div(ceil_div(call.queries(), tiles_), kLanes) * kLanes),
        parts_(call.B) {
    int64_t longest = 0;
    for (int64_t b = 0; b < call.B; ++b) {
      longest = std::max<int64_t>(longest, call.lengths[b]);
      total_ += call.lengths[b];
    }
    const int64_t all = total_ * tiles_;
    rows_ = std::max(kLeastRows, std::min(kManyRows, ceil_div(all, kPieces)));
    rows_ = std::max(rows_, ceil_div(all, kManyPieces));
    if (num_splits > 0) rows_ = std::max(rows_, ceil_div(longest, num_splits));
    rows_ = ceil_div(rows_, kMlaRows) * kMlaRows;
    for (int64_t b = 0; b < call.B; ++b) {
      parts_[b] = std::max<int64_t>(1, ceil_div(call.lengths[b], rows_));
      for (int64_t part = 0; part < parts_[b]; ++part) add(call, b, part);
    }
  }

  const std::vector<MlaPiece>& pieces() const { return pieces_; }
  int64_t rows() const { return total_; }
  int64_t parts(int64_t b) const { return parts_[b]; }
  int64_t part_of(const MlaPiece& piece) const { return piece.from / rows_; }

 private:
  void add(const MlaDecode& call, int64_t b, int64_t part) {
    const int64_t from = part * rows_, to = std::min<int64_t>(from + rows_, call.lengths[b]);
    for (int64_t query = 0; query < call.queries(); query += tile_) {
      pieces_.push_back({b, query, std::min(tile_, call.queries() - query), from, to});
    }
  }

  const int64_t tiles_, tile_;
  int64_t rows_, total_ = 0;
  std::vector<int64_t> parts_;
  std::vector<MlaPiece> pieces_;
};

// The results of sequences that have several parts.
class Parts {
 public:
  Parts(const MlaDecode& call, const Plan& plan) : call_(call), begin_(call.B, -1) {
    int64_t count = 0;
    for (int64_t b = 0; b < call.B; ++b) {
      if (plan.parts(b) == 1) continue;
      begin_[b] = count;
      count += plan.parts(b) * call.queries();
    }
    lse_.reset(new float[count]);
    out_.reset(new float[count * call.head_dim_v]);
  }

  MlaParts at(int64_t b, int64_t part) const {
    if (begin_[b] < 0) return {nullptr, nullptr};
    const int64_t first = begin_[b] + part * call_.queries();
    return {out_.get() + first * call_.head_dim_v, lse_.get() + first};
  }

 private:
  const MlaDecode& call_;
  std::vector<int64_t> begin_;  // in queries, or -1
  std::unique_ptr<float[]> lse_, out_;
};

// One thread's, on a cache line.
class Space {
 public:
  float* take(int64_t floats) {
    if (!data_) data_.reset(new float[floats + kLine]);
    const auto address = reinterpret_cast<uintptr_t>(data_.get());
    constexpr uintptr_t bytes = kLine * sizeof(float);
    return reinterpret_cast<float*>((address + bytes - 1) / bytes * bytes);
  }

  // Whether the last piece had the same queries.
  bool again(const MlaPiece& piece) {
    const bool same = piece.b == b_ && piece.query == query_;
    b_ = piece.b;
    query_ = piece.query;
    return same;
  }

 private:
  static constexpr int64_t kLine = 16;
  std::unique_ptr<float[]> data_;
  int64_t b_ = -1, query_ = -1;
};

}  // namespace

bool mla_decode_in_reach(const MlaDecode& call, int64_t num_blocks) {
  for (int64_t b = 0; b < call.B; ++b) {
    const int64_t length = call.lengths[b], used = ceil_div(length, call.pages.size);
    if (length < 0 || used > call.blocks) return false;
    const int32_t* ids = call.table + b * call.blocks;
    const auto wrong = [&](int32_t id) { return id < 0 || id >= num_blocks; };
    if (std::any_of(ids, ids + used, wrong)) return false;
  }
  return true;
}

void mla_decode_on_threads(const MlaDecode& call, int64_t num_splits, int threads) {
  const Plan plan(call, num_splits);
  const Parts parts(call, plan);
  const auto& pieces = plan.pieces();
  const int64_t work = plan.rows() * call.queries() * (call.width + call.head_dim_v);
  const int64_t jobs = std::clamp<int64_t>(work / kLeastWork, 1, threads);

  const int64_t floats = KEXUE_FOR_THIS_CPU(mla_decode_space)(call);
  const auto compute = KEXUE_FOR_THIS_CPU(mla_decode_piece);
  std::vector<Space> spaces(jobs);
  share_work(jobs, pieces.size(), [&](int64_t job, int64_t i) {
    const MlaPiece& piece = pieces[i];
    Space& space = spaces[job];
    compute(call, piece, space.take(floats), space.again(piece),
            parts.at(piece.b, plan.part_of(piece)));
  });

  const auto merge = KEXUE_FOR_THIS_CPU(mla_decode_merge);
  share_work(jobs, call.B * call.queries(), [&](int64_t, int64_t i) {
    const int64_t b = i / call.queries();
    if (plan.parts(b) > 1) merge(call, b, i % call.queries(), parts.at(b, 0), plan.parts(b));
  });
}

}  // namespace kexue
