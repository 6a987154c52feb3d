"""mla_decode by the C++ extension on CPU: allocates, and passes addresses and strides."""

from typing import Any

import torch
from torch import Tensor

from kexue_kernels import _extension
from kexue_kernels.mla import arguments

_C: Any = _extension.load().module  # the operator asks whether there is one

CHECKS_VALUES = True  # lengths and ids of blocks: the operator, which would take longer, need not

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def forward(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    softmax_scale: float,
    causal: bool,
    num_splits: int | None,
) -> tuple[Tensor, Tensor]:
    """q [B, Tq, H, dc+dr] -> out [B, Tq, H, head_dim_v], lse float32 [B, H, Tq]."""
    B, Tq, H, _ = sizes = q.shape
    out = q.new_empty(B, Tq, H, head_dim_v)
    lse = q.new_empty((B, H, Tq), dtype=torch.float32)
    served = _C.mla_decode(
        torch.get_num_threads(),
        CODES[q.dtype],
        tuple(sizes),
        head_dim_v,
        softmax_scale,
        causal,
        num_splits or 0,
        (q.data_ptr(), *q.stride()),
        (pages.data_ptr(), *pages.stride()),
        pages.shape[0],
        pages.shape[1],
        block_table.data_ptr(),
        block_table.shape[1],
        cache_seqlens.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
    )
    if not served:
        arguments.values_in_reach(block_table, cache_seqlens, pages)  # says what is wrong
    return out, lse
