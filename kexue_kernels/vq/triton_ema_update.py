"""The step of ema_update_ on GPUs with Triton: two small kernels, nothing read back."""

import torch
import triton
from torch import Tensor

from kexue_kernels.triton_common import launching_on
from kexue_kernels.vq.triton_ema_update_kernel import mean_kernel, size_kernel

NUM_STAGES = 1
NUM_WARPS = 4
SIZES = 2048  # codes of a program that updates sizes
BLOCKS = 128  # of their sums, added at once
_TILE = 1024


def configure(d: int) -> tuple[int, int]:
    """BLOCK_K and BLOCK_D of a program that updates means."""
    BLOCK_D = min(128, triton.next_power_of_2(d))
    return _TILE // BLOCK_D, BLOCK_D


def step(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_sum: Tensor,
    counts: Tensor,
    sums: Tensor,
    decay: float,
    eps: float,
) -> Tensor:
    """The first three in place, by any strides: [K, d], [K] and [K, d], or all with [G, …]."""
    codes, total = (x if x.ndim == 3 else x[None] for x in (codebook, embed_sum))
    size = cluster_size if cluster_size.ndim == 2 else cluster_size[None]
    G, K, d = codes.shape
    blocks = triton.cdiv(K, SIZES)
    totals = torch.empty(G, blocks, dtype=torch.float32, device=codebook.device)
    with launching_on(codebook):
        size_kernel[(blocks, G)](
            size,
            counts.contiguous(),
            totals,
            K,
            1 - decay,
            *size.stride(),
            BLOCK=SIZES,
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
        if d == 0:
            return codebook
        BLOCK_K, BLOCK_D = configure(d)
        mean_kernel[(triton.cdiv(K, BLOCK_K) * triton.cdiv(d, BLOCK_D), G)](
            codes,
            size,
            total,
            sums.contiguous(),
            totals,
            K,
            d,
            blocks,
            1 - decay,
            eps,
            *codes.stride(),
            *size.stride(),
            *total.stride(),
            BLOCKS=BLOCKS,
            BLOCK_K=BLOCK_K,
            BLOCK_D=BLOCK_D,
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
    return codebook
