// mla_attention on CPU: its blocks of queries, shared among threads. No result depends on their
// number.
#pragma once

#include "mla/mla_attention.h"

namespace kexue {

void mla_attention_on_threads(const MlaAttention& call, int threads);
void mla_attention_backward_on_threads(const MlaAttention& call,
                                       const MlaAttentionGradient& gradient, int threads);

}  // namespace kexue
