// A sweep in float32 over all rows and codes, and one over the rows that it left open, in which
// codes that may be the nearest are compared in float64.
#include "vq/nearest_codebook_threads.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "common/isa.h"
#include "common/pages.h"
#include "vq/nearest_codebook_few.h"
#include "common/work.h"

namespace kexue {
namespace {

constexpr int64_t kRowsBytes = 128 << 10;      // of rows in panels: they stay in L2
constexpr int64_t kCodesBytes = 4 << 20;       // of codes in panels that all threads read
constexpr int64_t kOwnCodesBytes = 256 << 10;  // and that one thread reads
constexpr int64_t kLeastWork = 1 << 18;        // products for a thread to be worth its start
constexpr int64_t kLeastRows = 1 << 12;        // to settle, likewise
constexpr int64_t kSample = 1024;              // codes that say where the centre is
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Floats on cache lines, not initialised.
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<float*>(::operator new(size * sizeof(float), kLine))) {
    prefer_huge_pages(data_.get(), size * sizeof(float));
  }
  float* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Delete {
    void operator()(float* data) const { ::operator delete(data, kLine); }
  };
  std::unique_ptr<float, Delete> data_;
};

struct Codes {
  std::vector<float> centre, bias, length;
  std::vector<double> norm;
  float longest = 0;   // of those that float32 takes
  bool wild = false;   // there are others
  int64_t first = -1;  // finite one

  Codes(const NearestCodebook& call, int threads)
      : centre(call.d, 0.0f),
        bias(call.K),
        length(call.K),
        norm(call.metric == Metric::cosine ? call.K : 0) {
    if (call.metric == Metric::l2) {
      std::vector<double> sums(call.d);
      const auto find = KEXUE_FOR_THIS_CPU(nearest_codebook_centre);
      find(call, ceil_div(call.K, kSample), sums.data(), centre.data());
    }
    const CodeFacts facts = this->facts();
    const auto describe = KEXUE_FOR_THIS_CPU(nearest_codebook_describe);
    const int64_t jobs = std::clamp<int64_t>(call.K * call.d / kLeastWork, 1, threads);
    run_jobs(jobs,
             [&](int64_t i) { describe(call, facts, call.K * i / jobs, call.K * (i + 1) / jobs); });
    for (int64_t k = 0; k < call.K; ++k) {
      if (std::isnan(bias[k])) continue;
      if (first < 0) first = k;
      if (std::isinf(bias[k])) {
        wild = true;
      } else {
        longest = std::max(longest, length[k]);
      }
    }
  }

  CodeFacts facts() { return {centre.data(), bias.data(), length.data(), norm.data()}; }
};

// How threads share a sweep over n rows: blocks of rows, and, where they are few, parts of each
// chunk of codes. All in panels.
struct Sharing {
  SearchTile tile;
  int64_t row_panels, code_panels;
  int64_t jobs, parts;
  int64_t block, chunk;

  Sharing(const NearestCodebook& call, int64_t n, int threads)
      : tile(KEXUE_FOR_THIS_CPU(nearest_codebook_tile)()),
        row_panels(ceil_div(n, tile.rows)),
        code_panels(ceil_div(call.K, tile.codes)) {
    jobs = int64_t(std::clamp(double(n) * call.K * call.d / kLeastWork, 1.0, double(threads)));
    parts = row_panels >= 4 * jobs ? 1 : std::min(jobs, code_panels);
    block = std::clamp<int64_t>(kRowsBytes / (call.d * tile.rows * 4), 1, row_panels);
    if (parts == 1) block = std::min(block, ceil_div(row_panels, 4 * jobs));
    const int64_t bytes = parts == 1 ? kCodesBytes : parts * kOwnCodesBytes;
    const int64_t most = std::max(parts, bytes / ((call.d + 1) * tile.codes * 4));
    chunk = ceil_div(code_panels, ceil_div(code_panels, most));
  }

  int64_t rows() const { return row_panels * tile.rows; }
  int64_t blocks() const { return ceil_div(row_panels, block); }
};

// Calls body(job, part, rows, codes) for the rows of a list, or all of them without one, and all
// codes: for each row and part in ascending order of the codes.
template <class Body>
void sweep(const NearestCodebook& call, const CodeFacts& facts, const Sharing& sharing,
           const int64_t* list, int64_t n, float* lengths, const Body& body) {
  const auto pack_codes = KEXUE_FOR_THIS_CPU(nearest_codebook_pack_codes);
  const auto pack_rows = KEXUE_FOR_THIS_CPU(nearest_codebook_pack_rows);
  const SearchTile tile = sharing.tile;
  const int64_t row_panel = call.d * tile.rows, code_panel = (call.d + 1) * tile.codes;
  const int64_t block = sharing.block, parts = sharing.parts, jobs = sharing.jobs;
  const Buffer codes(sharing.chunk * code_panel);
  const Buffer rows(jobs * block * row_panel);
  std::vector<float> unused(parts > 1 ? jobs * block * tile.rows : 0);
  for (int64_t first = 0; first < sharing.code_panels; first += sharing.chunk) {
    const int64_t count = std::min(sharing.chunk, sharing.code_panels - first);
    const auto share = [&](int64_t i, int64_t of) -> CodePanels {
      const int64_t from = count * i / of, to = count * (i + 1) / of;
      return {codes.data() + from * code_panel, to - from, (first + from) * tile.codes};
    };
    run_jobs(jobs, [&](int64_t job) { pack_codes(call, facts, share(job, jobs)); });
    share_work(jobs, sharing.blocks() * parts, [&](int64_t job, int64_t i) {
      const int64_t panel = i / parts * block, part = i % parts, from = panel * tile.rows;
      const int64_t panels = std::min(block, sharing.row_panels - panel);
      float* length = part == 0 ? lengths + from : &unused[job * block * tile.rows];
      const int64_t used = std::min(panels * tile.rows, n - from);
      float* data = rows.data() + job * block * row_panel;
      const RowPanels packed{data, panels, list, from, used, length};
      pack_rows(call, facts, packed);
      body(job, part, packed, share(part, parts));
    });
  }
}

// ---- float32

struct Found {
  double best, second;
  int64_t index;
};

struct FirstSweep {
  const Sharing sharing;
  const int64_t rows;
  std::vector<float> length;        // [rows]
  std::vector<float> best, second;  // [parts, rows]
  std::vector<int64_t> index;

  FirstSweep(const NearestCodebook& call, const CodeFacts& facts, int threads)
      : sharing(call, call.N, threads),
        rows(sharing.rows()),
        length(rows),
        best(sharing.parts * rows, -kInfinity),
        second(best),
        index(best.size(), -1) {
    const auto search = KEXUE_FOR_THIS_CPU(nearest_codebook_search);
    const int64_t block = sharing.block * sharing.tile.rows;
    std::vector<int32_t> places(sharing.jobs * block);
    sweep(call, facts, sharing, nullptr, call.N, length.data(),
          [&](int64_t job, int64_t part, const RowPanels& panels, const CodePanels& codes) {
            const int64_t at = part * rows + panels.from;
            int32_t* place = &places[job * block];
            std::fill(place, place + block, -1);
            search(call.d, panels, codes, {&best[at], &second[at], place});
            for (int64_t i = 0; i < panels.rows; ++i) {
              if (place[i] >= 0) index[at + i] = codes.first + place[i];
            }
          });
  }

  Found found(int64_t row) const {
    Found all{-kInfinity, -kInfinity, -1};
    for (int64_t at = row; at < int64_t(best.size()); at += rows) {
      const bool earlier = best[at] == all.best && index[at] < all.index;
      if (best[at] > all.best || earlier) {
        all = {best[at], std::max<double>(all.best, second[at]), index[at]};
      } else {
        all.second = std::max<double>(all.second, best[at]);
      }
    }
    return all;
  }
};

float round_down(double x) {
  const float y = float(x);
  return y > x ? std::nextafter(y, -kInfinity) : y;
}

// NaN where the row has its index now. Otherwise every code whose float32 score is below the bar
// is farther than another.
float settle(const NearestCodebook& call, const Codes& codes, float length, const Found& found,
             int64_t& index) {
  index = -1;
  if (std::isnan(length) || codes.first < 0) return kNaN;
  if (length == 0 && call.metric != Metric::l2) {
    index = codes.first;  // all scores are zero
    return kNaN;
  }
  if (std::isinf(length) || found.index < 0) return -kInfinity;
  // The nearest code is at most as far from the row as the found one: longer ones are farther.
  double reach = codes.longest;
  if (call.metric == Metric::l2) {
    const double most = (2.0 * length + codes.length[found.index]) * (1 + 0x1p-40);
    if (codes.wild && most > kLongest / 2) return -kInfinity;
    reach = std::min(reach, most);
  } else if (codes.wild) {
    return -kInfinity;
  }
  const double margin = 2 * score_error(call.metric, call.d, length, reach);
  if (call.exact && !(found.best - found.second > margin)) return round_down(found.best - margin);
  index = found.index;
  return kNaN;
}

// ---- float64

void recheck_rows(const NearestCodebook& call, const CodeFacts& facts, std::vector<int64_t>& list,
                  std::vector<float>& bars, int threads) {
  const int64_t n = list.size();
  const Sharing sharing(call, n, threads);
  const int64_t rows = sharing.rows();
  bars.resize(rows, kInfinity);
  std::vector<float> length(rows);
  std::vector<double> score(sharing.parts * rows);
  std::vector<int64_t> index(score.size(), -1);
  const auto recheck = KEXUE_FOR_THIS_CPU(nearest_codebook_recheck);
  sweep(call, facts, sharing, list.data(), n, length.data(),
        [&](int64_t, int64_t part, const RowPanels& panels, const CodePanels& codes) {
          const int64_t at = part * rows + panels.from;
          recheck(call, facts, panels, codes, {&bars[panels.from], &score[at], &index[at]});
        });
  for (int64_t i = 0; i < n; ++i) {
    int64_t best = -1;
    for (int64_t at = i; at < int64_t(index.size()); at += rows) {
      if (index[at] < 0) continue;
      const bool earlier = best >= 0 && score[at] == score[best] && index[at] < index[best];
      if (best < 0 || score[at] > score[best] || earlier) best = at;
    }
    call.indices[list[i]] = best < 0 ? -1 : index[best];
  }
}

}  // namespace

void nearest_codebook_on_threads(const NearestCodebook& call, int threads) {
  if (call.N <= kFewRows) return nearest_codebook_few_on_threads(call, threads);
  Codes codes(call, threads);
  const FirstSweep first(call, codes.facts(), threads);
  std::vector<float> bars(call.N);
  const int64_t jobs = std::clamp<int64_t>(call.N / kLeastRows, 1, threads);
  run_jobs(jobs, [&](int64_t i) {
    for (int64_t row = call.N * i / jobs; row < call.N * (i + 1) / jobs; ++row) {
      bars[row] = settle(call, codes, first.length[row], first.found(row), call.indices[row]);
    }
  });
  std::vector<int64_t> open;
  std::vector<float> open_bars;
  for (int64_t row = 0; row < call.N; ++row) {
    if (std::isnan(bars[row])) continue;
    open.push_back(row);
    open_bars.push_back(bars[row]);
  }
  if (!open.empty()) recheck_rows(call, codes.facts(), open, open_bars, threads);
}

}  // namespace kexue
