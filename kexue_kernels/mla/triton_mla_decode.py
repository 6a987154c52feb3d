"""mla_decode on GPUs with Triton: tiles, and into how many splits a sequence is cut."""

from typing import Literal, NamedTuple

import torch
import triton
from torch import Tensor

from kexue_kernels import dispatch
from kexue_kernels.mla.splits import choose_splits
from kexue_kernels.mla.triton_mla_decode_kernel import decode_kernel, join_kernel
from kexue_kernels.triton_common import launching_on, multiprocessors

LOG2E = 1.4426950408889634
WIDEST = 512  # columns of a value that a program holds


Target = Literal["sm_80", "sm_90", "amd"]  # "sm_90" also stands for sm_100, "sm_80" for all others


class Config(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


def configure(rows: int, columns: int, dtype: torch.dtype, target: Target) -> Config:
    """Queries as they are, from 16 to 64: with 64, sm_90 multiplies by warp groups.

    dtype is that of the pages: uint8 for rows of bytes, whose numbers take registers.
    """
    BLOCK_M = min(64, max(16, triton.next_power_of_2(rows)))
    wide = BLOCK_M * columns > 16 * 512
    if dtype == torch.uint8:
        BLOCK_M = min(BLOCK_M, 32)
        return Config(BLOCK_M, 16, 4, 1) if target == "amd" else Config(BLOCK_M, 32, 8, 2)
    if dtype == torch.float32:  # without tensor cores, and twice as wide
        return Config(16, 32 if target == "sm_90" else 16, 4 if target == "amd" else 8, 1)
    if target == "amd":  # whose waves are of 64, with more registers where they are few
        return Config(min(BLOCK_M, 32), 16 if wide else 32, 4, 1)
    if BLOCK_M < 64:
        return Config(BLOCK_M, 32, 8 if wide else 4, 2)
    if target == "sm_80":  # within the 99 KiB of its smaller kin
        return Config(64, 16, 8, 2)
    return Config(64, 32 if columns > 256 else 64, 8, 2)


def configure_interpreted(rows: int, columns: int, dtype: torch.dtype, target: Target) -> Config:
    """For Triton's interpreter: few, large tiles."""
    del columns, dtype, target
    return Config(min(64, max(16, triton.next_power_of_2(rows))), 16, 1, 1)


def target_of(device: torch.device) -> Target:
    if torch.version.hip:
        return "amd"
    if device.type == "cpu":  # interpreting
        return "sm_80"
    return "sm_90" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "sm_80"


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
    B, Tq, H, width = q.shape
    num_blocks, block_size, _ = pages.shape
    max_blocks = block_table.shape[1]
    rest = width - head_dim_v
    rule = configure_interpreted if dispatch.interpreting() else configure
    config = rule(Tq * H, head_dim_v, pages.dtype, target_of(q.device))
    tiles = triton.cdiv(Tq * H, config.BLOCK_M)
    blocks = triton.cdiv(max_blocks * block_size, config.BLOCK_N)
    splits = num_splits or choose_splits(B * tiles, blocks, multiprocessors(q.device))
    out, lse = _new(q, (B, Tq, H, head_dim_v), q.dtype), _new(q, (B, H, Tq), torch.float32)
    parts, part_lse = out, lse
    if splits > 1:
        parts = _new(q, (splits, *out.shape), torch.float32)
        part_lse = _new(q, (splits, *lse.shape), torch.float32)
    BLOCK_V = max(16, triton.next_power_of_2(head_dim_v))
    BLOCK_R = max(16, triton.next_power_of_2(rest)) if rest else 0
    with launching_on(q):
        decode_kernel[(B * tiles, splits)](
            q, pages, block_table, cache_seqlens, parts, part_lse,
            B, Tq, H, head_dim_v, rest, num_blocks, block_size, max_blocks, splits,
            softmax_scale * LOG2E, *q.stride(), *pages.stride(),
            CAUSAL=causal, BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N,
            BLOCK_V=BLOCK_V, BLOCK_R=BLOCK_R,
            EVEN_V=head_dim_v == BLOCK_V, EVEN_R=rest == BLOCK_R, FP8=pages.dtype == torch.uint8,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if splits > 1:
            join_kernel[(B * Tq * H, triton.cdiv(head_dim_v, JOIN_V))](
                parts, part_lse, out, lse, B, Tq, H, head_dim_v, splits,
                BLOCK_S=triton.next_power_of_2(splits), BLOCK_V=JOIN_V, num_warps=JOIN_WARPS,
            )  # fmt: skip
    return out, lse


JOIN_V, JOIN_WARPS = 512, 4


def _new(q: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=q.device)
