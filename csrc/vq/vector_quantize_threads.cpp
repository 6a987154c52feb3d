#include "vq/vector_quantize_threads.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "common/isa.h"
#include "common/pages.h"
#include "vq/code_sums.h"
#include "common/work.h"

namespace kexue {
namespace {

constexpr int64_t kBlock = 256;  // rows whose losses are added first
constexpr int64_t kLargeBytes = 8 << 20;
constexpr int64_t kLeastWork = 16 * 1024;  // elements for a thread to be worth its start

int64_t item_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Before new memory [N, d] is written: its first touch costs more than what is written.
void prepare_output(const VectorQuantize& call, void* data) {
  const int64_t bytes = call.N * call.d * item_bytes(call.dtype);
  if (bytes >= kLargeBytes) prefer_huge_pages(data, bytes);
}

int64_t rows_with_code(const VectorQuantize& call) {
  return std::count_if(call.indices, call.indices + call.N,
                       [&](int64_t k) { return k >= 0 && k < call.K; });
}

// Calls body(block, from, to) for blocks of rows.
template <class Body>
void for_blocks(const VectorQuantize& call, int threads, const Body& body) {
  const int64_t jobs = std::clamp<int64_t>(call.N * call.d / kLeastWork, 1, threads);
  share_work(jobs, ceil_div(call.N, kBlock), [&](int64_t, int64_t block) {
    body(block, block * kBlock, std::min(call.N, (block + 1) * kBlock));
  });
}

}  // namespace

float vector_quantize_on_threads(const VectorQuantize& call, void* quantized, int threads) {
  prepare_output(call, quantized);
  std::vector<double> squares(ceil_div(call.N, kBlock));
  const auto forward = KEXUE_FOR_THIS_CPU(vector_quantize_forward);
  for_blocks(call, threads, [&](int64_t block, int64_t from, int64_t to) {
    squares[block] = forward(call, from, to, quantized);
  });
  const double terms = double(rows_with_code(call)) * call.d;
  return float(std::accumulate(squares.begin(), squares.end(), 0.0) / std::max(1.0, terms));
}

void vector_quantize_on_threads(VectorQuantizeBackward call, double scale_x, double scale_c,
                                void* grad_codebook, int threads) {
  const VectorQuantize& forward = call.forward;
  prepare_output(forward, call.grad_x);
  const RowsByCode by_code(forward.indices, forward.N, forward.K);
  const double per_term = 2 / std::max(1.0, double(by_code.rows.size()) * forward.d);
  call.commitment = scale_x * per_term;
  const auto backward = KEXUE_FOR_THIS_CPU(vector_quantize_backward);
  for_blocks(forward, threads,
             [&](int64_t, int64_t from, int64_t to) { backward(call, from, to); });
  if (grad_codebook == nullptr) return;

  const int64_t row_bytes = forward.d * item_bytes(forward.dtype);
  const auto* codebook = static_cast<const char*>(forward.codebook.data);
  const double codes = scale_c * per_term;  // times q - x, of each row of a code
  const auto finish = KEXUE_FOR_THIS_CPU(code_sums_finish);
  sum_by_code(forward.dtype, forward.x, forward.d, by_code, threads,
              [&](int64_t k, const double* sum) {
                finish({forward.dtype, -codes, codes * by_code.count(k), codebook + k * row_bytes,
                        static_cast<char*>(grad_codebook) + k * row_bytes},
                       sum, forward.d);
              });
}

}  // namespace kexue
