"""The running means of ema_update_: sizes of all codes first, as each needs the sizes' sum."""

import triton
import triton.language as tl

from kexue_kernels.triton_common import inline


@inline
def _lerp(running, new, weight):
    """running + weight (new - running), exact at either end."""
    step = new - running
    return tl.where(weight < 0.5, running + weight * step, new - step * (1 - weight))


@triton.jit(do_not_specialize=["K"])
def size_kernel(
    size_ptr, counts_ptr, totals_ptr, K, weight, size_group, size_code, BLOCK: tl.constexpr
):  # fmt: skip
    """cluster_size [G, K] (by strides) follows counts [G, K]; totals [G, blocks] are its sums."""
    block = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    codes = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    size_ptrs = size_ptr + group * size_group + codes * size_code
    size = tl.load(size_ptrs, mask=codes < K, other=0)
    count = tl.load(counts_ptr + group * K + codes, mask=codes < K, other=0).to(tl.float32)
    size = _lerp(size, count, weight)
    tl.store(size_ptrs, size, mask=codes < K)
    tl.store(totals_ptr + group * tl.num_programs(0) + block, tl.sum(size))


@inline
def _total(totals_ptr, blocks, BLOCKS: tl.constexpr):
    """The sum of a group's totals [blocks]."""
    total = tl.zeros((BLOCKS,), tl.float32)
    start = 0
    while start < blocks:
        at = start + tl.arange(0, BLOCKS)
        total += tl.load(totals_ptr + at, mask=at < blocks, other=0)
        start += BLOCKS
    return tl.sum(total)


@triton.jit(do_not_specialize=["K", "blocks"])
def mean_kernel(
    codebook_ptr, size_ptr, sum_ptr, sums_ptr, totals_ptr, K, d, blocks, weight, eps,
    code_group, code_code, code_d, size_group, size_code, sum_group, sum_code, sum_d,
    BLOCKS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """embed_sum [G, K, d] follows sums; codebook is its mean by the smoothed cluster_size."""
    group = tl.program_id(1).to(tl.int64)
    columns = (tl.program_id(0) % tl.cdiv(d, BLOCK_D)) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    columns = columns.to(tl.int64)
    codes = tl.program_id(0) // tl.cdiv(d, BLOCK_D) * BLOCK_K + tl.arange(0, BLOCK_K)[:, None]
    codes = codes.to(tl.int64)
    held = (codes < K) & (columns < d)
    sum_ptrs = sum_ptr + group * sum_group + codes * sum_code + columns * sum_d
    running = tl.load(sum_ptrs, mask=held, other=0)
    new = tl.load(sums_ptr + (group * K + codes) * d + columns, mask=held, other=0)
    size = tl.load(size_ptr + group * size_group + codes * size_code, mask=codes < K, other=0)
    total = _total(totals_ptr + group * blocks, blocks, BLOCKS)

    running = _lerp(running, new, weight)
    smoothed = (size + eps) / (total + K * eps) * total
    tl.store(sum_ptrs, running, mask=held)
    mean = running / tl.where(smoothed > 0, smoothed, 1)
    code_ptrs = codebook_ptr + group * code_group + codes * code_code + columns * code_d
    tl.store(code_ptrs, mean.to(codebook_ptr.dtype.element_ty), mask=held & (smoothed > 0))
