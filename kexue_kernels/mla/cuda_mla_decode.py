"""mla_decode on Hopper GPUs in CUDA C++, for 64 and more queries of a sequence.

The kernel: csrc/mla/mla_decode_hopper.cuh. Nothing here waits for the device, so calls can be
captured in a graph. "auto" leaves it alone until a GPU has passed its tests
(launchers.OFF_BY_DEFAULT).
"""

import torch
from torch import Tensor

from kexue_kernels import dispatch
from kexue_kernels.cuda_common import ALIGNMENT, refused_by_device, rows_aligned
from kexue_kernels.cuda_common import current_stream as _stream
from kexue_kernels.cuda_common import module as _module
from kexue_kernels.cuda_common import processors as _processors
from kexue_kernels.mla.splits import choose_splits

DTYPES = {torch.bfloat16: 1, torch.float16: 2}
WIDTH, HEAD_DIM_V = 576, 512
QUERIES, KEYS = 64, 64  # of a thread block, and of what it loads at once


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
    if refused := reasons(q, pages, head_dim_v):
        raise dispatch.BackendUnavailableError(
            f"mla_decode: backend 'cuda' can't serve this call: {'; '.join(refused)}"
        )
    B, Tq, H, _ = q.shape
    num_blocks, block_size, _ = pages.shape
    max_blocks = block_table.shape[1]
    if not rows_aligned(q, q.stride()[:3]):
        q = q.clone(memory_format=torch.contiguous_format)
    tiles = -(-Tq * H // QUERIES)
    blocks = -(-max_blocks * block_size // KEYS)
    splits = num_splits or choose_splits(B * tiles, blocks, _processors(q.device))
    out = q.new_empty((B, Tq, H, HEAD_DIM_V))
    lse = q.new_empty((B, H, Tq), dtype=torch.float32)
    parts = part_lse = None
    if splits > 1:
        parts = q.new_empty((splits, *out.shape), dtype=torch.float32)
        part_lse = q.new_empty((splits, *lse.shape), dtype=torch.float32)
    with _stream(q.device) as stream:
        _module().mla_decode_cuda(
            sizes=(B, Tq, H, num_blocks, block_size, max_blocks, splits),
            causal=causal,
            dtype=DTYPES[q.dtype],
            q=(q.data_ptr(), *q.stride()[:3]),
            pages=(pages.data_ptr(), *_page_strides(pages)),
            table=block_table.data_ptr(),
            seqlens=cache_seqlens.data_ptr(),
            out=out.data_ptr(),
            lse=lse.data_ptr(),
            parts=0 if parts is None else parts.data_ptr(),
            part_lse=0 if part_lse is None else part_lse.data_ptr(),
            softmax_scale=softmax_scale,
            stream=stream,
        )
    return out, lse


def reasons(q: Tensor, pages: Tensor, head_dim_v: int) -> list[str]:
    """Why the kernel can't serve this call, beyond what the backend's status says."""
    _, Tq, H, width = q.shape
    serves = "the Hopper path serves"
    found = []
    if q.dtype not in DTYPES:
        found.append(f"{serves} bfloat16 and float16, got {q.dtype}")
    if (width, head_dim_v) != (WIDTH, HEAD_DIM_V):
        found.append(
            f"{serves} dc + dr = {WIDTH} and head_dim_v = {HEAD_DIM_V}, got {width} and "
            f"{head_dim_v}"
        )
    elif not rows_aligned(pages, _page_strides(pages)):
        found.append(
            f"{serves} caches whose rows are contiguous and aligned to {ALIGNMENT} bytes, got "
            f"strides {list(pages.stride())} at an address {pages.data_ptr() % ALIGNMENT} bytes off"
        )
    if Tq * H < QUERIES:
        found.append(
            f"{serves} {QUERIES} and more queries of a sequence (heads times query tokens), got "
            f"{Tq * H}"
        )
    return found + refused_by_device(q.device)


def _page_strides(pages: Tensor) -> tuple[int, int]:
    """Of blocks and of rows; where there is only one, any will do."""
    num_blocks, block_size, width = pages.shape
    row = pages.stride(1) if block_size > 1 else width
    return pages.stride(0) if num_blocks > 1 else block_size * row, row
