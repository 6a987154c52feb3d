#include "vq/code_sums_cpu.h"

#include "common/reading.h"

namespace kexue::KEXUE_ISA {

void code_sums_add(DType dtype, const MatrixView& x, const int64_t* rows, int64_t n, int64_t d,
                   double* sum) {
  with_items(dtype, [&](auto item) {
    float buffer[kPiece];
    for (int64_t i = 0; i < n; ++i) {
      const auto row = row_of<decltype(item)>(x, rows[i]);
      for_pieces(d, [&](int64_t from, int64_t size) {
        const float* p = row.read(from, size, buffer);
        for (int64_t j = 0; j < size; ++j) sum[from + j] += p[j];
      });
    }
  });
}

void code_sums_finish(const FinishedSum& call, const double* sum, int64_t d) {
  with_items(call.dtype, [&](auto item) {
    using Item = decltype(item);
    Item* out = static_cast<Item*>(call.out);
    if (call.code == nullptr) {
      for (int64_t i = 0; i < d; ++i) store<1>(out + i, float(call.scale * sum[i]));
      return;
    }
    const Item* code = static_cast<const Item*>(call.code);
    for (int64_t i = 0; i < d; ++i) {
      store<1>(out + i, float(call.scale * sum[i] + call.shift * double(load<1>(code + i))));
    }
  });
}

}  // namespace kexue::KEXUE_ISA
