"""codebook_statistics on GPUs with Triton: sorts the rows by code, then sums segments."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kexue_kernels import dispatch
from kexue_kernels.triton_common import launching_on
from kexue_kernels.vq.triton_codebook_statistics_kernel import chunk_kernel, join_kernel

NUM_STAGES = 1
PARTS = 64  # read at once by the program that joins them


class Config(NamedTuple):
    """Of both kernels: a program of one warp, and one of four."""

    BATCH: int
    BLOCK_D: int
    JOIN_D: int


def configure(d: int, differences: bool) -> Config:
    """4 channels a thread, as float32 sums are stored; rows in flight as registers allow."""
    BLOCK_D = max(16, min(triton.next_power_of_2(d), 128))
    return Config(8 if differences else 16, BLOCK_D, min(BLOCK_D, 64))


def configure_interpreted(d: int, differences: bool) -> Config:
    """For Triton's interpreter, which takes time for every row of a batch, there or not."""
    return configure(d, differences)._replace(BATCH=4)


def chunk_of(N: int) -> int:
    """Rows to a chunk: 4096 chunks where there are as many rows, but neither tiny nor long."""
    return min(256, max(32, triton.next_power_of_2(triton.cdiv(N, 4096))))


class Sorted(NamedTuple):
    """Rows sorted by code; those without one come first and last."""

    keys: Tensor  # [N], clamped to -1 .. K
    order: Tensor  # int64 [N]
    starts: Tensor  # int64 [K + 1]


def sort(indices: Tensor, num_codes: int) -> Sorted:
    """By as few bits as the codes need: a radix sort takes time for each."""
    dtypes = (torch.int16, torch.int32, torch.int64)
    dtype = next(each for each in dtypes if num_codes < torch.iinfo(each).max)
    keys, order = indices.clamp(-1, num_codes).to(dtype).sort(stable=True)
    codes = torch.arange(num_codes + 1, dtype=dtype, device=indices.device)
    return Sorted(keys, order, torch.searchsorted(keys, codes))


def statistics(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """counts int64 [K] and sums float32 [K, d]."""
    rows = sort(indices, num_codes)
    sums = torch.zeros(num_codes, x.shape[1], dtype=torch.float32, device=x.device)
    segmented_sum(x, rows, sums)
    return rows.starts.diff(), sums


def segmented_sum(
    x: Tensor,
    rows: Sorted,
    out: Tensor,
    codebook: Tensor | None = None,
    scale: Tensor | None = None,
    terms: Tensor | None = None,
) -> None:
    """Fill zeros `out` [K, d] with the sum of each code's rows of x [N, d].

    With a codebook [K, d], a scale and a number of terms, float32 and int64 scalars: with
    2 scale / (terms d) times the sum of the code minus the row.
    """
    N, d = x.shape
    rule = configure_interpreted if dispatch.interpreting() else configure
    K, config = out.shape[0], rule(d, codebook is not None)
    chunk = chunk_of(N)
    chunks = triton.cdiv(N, chunk)
    parts = torch.empty(chunks, 2, d, dtype=torch.float32, device=x.device)
    with launching_on(x):
        chunk_kernel[(chunks * triton.cdiv(d, config.BLOCK_D),)](
            x,
            codebook,
            scale,
            terms,
            rows.keys,
            rows.order,
            rows.starts,
            out,
            parts,
            K,
            d,
            chunk,
            BATCH=config.BATCH,
            BLOCK_D=config.BLOCK_D,
            num_warps=1,
            num_stages=NUM_STAGES,
        )
        join_kernel[(chunks * triton.cdiv(d, config.JOIN_D),)](
            parts,
            scale,
            terms,
            rows.keys,
            rows.starts,
            out,
            K,
            d,
            chunk,
            PARTS=PARTS,
            BLOCK_D=config.JOIN_D,
            num_warps=4,
            num_stages=NUM_STAGES,
        )
