"""vector_quantize on GPUs with Triton: allocates, and picks tiles by the number of channels."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kexue_kernels.triton_common import launching_on
from kexue_kernels.vq import triton_codebook_statistics
from kexue_kernels.vq.triton_vector_quantize_kernel import (
    backward_kernel,
    forward_kernel,
    mean_kernel,
)

NUM_STAGES = 1
MEAN_BLOCK, MEAN_WARPS = 4096, 8
_TILE = 2048  # 16 elements a thread; half of it where rows are read in parts


class Config(NamedTuple):
    ROWS: int
    BLOCK_D: int
    num_warps: int = 4


def configure(d: int) -> Config:
    """Whole rows where they fit into a tile."""
    BLOCK_D = triton.next_power_of_2(d) if d <= _TILE else _TILE // 2
    return Config(max(1, min(32, _TILE // 2 // BLOCK_D)), BLOCK_D)


def forward(x: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's code [N, d], NaN without one, and the mean of (x - q)^2 over the others."""
    N, d = x.shape
    config = configure(d)
    programs = triton.cdiv(N, config.ROWS)
    quantized = torch.empty_like(x)
    squares = torch.empty(programs, dtype=torch.float32, device=x.device)
    counts = torch.empty(programs, dtype=torch.int32, device=x.device)
    mean = torch.empty((), dtype=torch.float32, device=x.device)
    with launching_on(x):
        forward_kernel[(programs,)](
            x,
            codebook,
            indices,
            quantized,
            squares,
            counts,
            N,
            *codebook.shape,
            ROWS=config.ROWS,
            BLOCK_D=config.BLOCK_D,
            num_warps=config.num_warps,
            num_stages=NUM_STAGES,
        )
        mean_kernel[(1,)](
            squares,
            counts,
            mean,
            programs,
            d,
            BLOCK=MEAN_BLOCK,
            num_warps=MEAN_WARPS,
            num_stages=NUM_STAGES,
        )
    return quantized, mean


def backward(
    grad_quantized: Tensor,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    gradient: str,
    scale_x: Tensor,
    scale_c: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """grad_x [N, d], and grad_codebook [K, d], which has no elements without a scale_c."""
    N, d = x.shape
    config = configure(d)
    grad_x = torch.empty_like(x)
    with_code = torch.count_nonzero(indices >= 0)  # losses are means over so many rows of d
    with launching_on(x):
        backward_kernel[(triton.cdiv(N, config.ROWS),)](
            grad_quantized,
            x,
            codebook,
            indices,
            scale_x,
            with_code,
            grad_x,
            N,
            *codebook.shape,
            *grad_quantized.stride(),
            ROTATION=gradient == "rotation",
            WHOLE=d <= config.BLOCK_D,
            ROWS=config.ROWS,
            BLOCK_D=config.BLOCK_D,
            num_warps=config.num_warps,
            num_stages=NUM_STAGES,
        )
    if scale_c is None:
        return grad_x, codebook.new_empty(0)
    grad_codebook = torch.zeros_like(codebook)
    rows = triton_codebook_statistics.sort(indices, codebook.shape[0])
    triton_codebook_statistics.segmented_sum(x, rows, grad_codebook, codebook, scale_c, with_code)
    return grad_x, grad_codebook
