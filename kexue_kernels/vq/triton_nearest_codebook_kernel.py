"""nearest_codebook's pass over all rows and codes, and what becomes of each row after it.

A score costs a multiplication of the tensor core's, and in its epilogue little else: the column
of a tile replaces the last bits of the score, so that one minimum gives the code as well, and two
minima and a maximum the second best beside the best.
"""

import triton
import triton.language as tl

from kexue_kernels import dispatch
from kexue_kernels.triton_common import bound, inline
from kexue_kernels.vq.triton_nearest_codebook_scores import (
    INFINITY,
    NONE,
    SLACK,
    load_channels,
    products,
    row_bounds,
    row_operands,
)

BROKEN = tl.constexpr(-2)  # the index of a row that is not finite


@inline
def lesser_two(best, second, other_best, other_second):
    """Of two pairs, each ascending; a minimum passes over a NaN."""
    least = tl.minimum(best, other_best)
    rest = tl.minimum(second, other_second)
    return least, tl.minimum(rest, greater(best, other_best, least))


@inline
def greater(x, y, least):
    """The maximum but for rounding, by adders: those that compare have more to do."""
    return tl.maximum(x, y)


def _two_least_by_turns(x, EXACT):
    """For Triton's interpreter, which reduces by anything else element by element."""
    x = tl.where(x == x, x, NONE)
    least = tl.min(x, axis=1)
    return least, tl.min(tl.where(x == least[:, None], INFINITY, x), axis=1)


def _two_least(x, EXACT: tl.constexpr):
    if EXACT:
        pairs = tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2))
        first, second = tl.split(pairs)
        least = tl.minimum(first, second)
        return tl.reduce((least, greater(first, second, least)), 1, lesser_two)
    else:
        least = tl.min(x, axis=1)
        return least, least


# The least two of x [N, K] in each row, NaN apart; the least alone where it need not be EXACT.
two_least = _two_least_by_turns if dispatch.interpreting() else inline(_two_least)


@inline
def packed(s, columns, BLOCK_K: tl.constexpr):
    """Scores with their columns for their last bits."""
    bits = s.to(tl.int32, bitcast=True) & -BLOCK_K
    return (bits | columns).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["N", "K", "splits", "tiles_per_split"])
def search_kernel(
    x_ptr, codes_ptr, mean_ptr, bias_ptr, scale_ptr, tile_ptr,
    lower_ptr, upper_ptr, second_ptr, index_ptr,
    N, K, d, splits, tiles_per_split,
    x_head, x_row, x_channel, c_head, c_code, c_channel,
    eps, shared, tiny,
    EXACT: tl.constexpr, CENTRED: tl.constexpr, SINGLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNKS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_N rows and the codes of a split: [H, splits, N] of the least lower bound of a
    score, that score's upper bound, the second least lower bound, and the code."""
    blocks = tl.cdiv(N, BLOCK_N)
    block = tl.program_id(0) % blocks  # beside each other, so that they read the same codes
    split = tl.program_id(0) // blocks
    head = (split // splits).to(tl.int64)
    split = split % splits
    tiles = tl.cdiv(K, BLOCK_K)
    if CENTRED:
        mean_ptr += head * d
    padded_K = tl.cast(tiles, tl.int64) * BLOCK_K
    bias_ptr += head * padded_K
    tile_ptr += 2 * head * tiles
    codes_ptr += head * c_head

    rows = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptrs = x_ptr + head * x_head + tl.minimum(rows, N - 1)[:, None] * x_row
    e, f, finite = row_bounds(
        x_ptrs, x_channel, mean_ptr, d, eps, shared, tiny,
        BLOCK_N, BLOCK_D, CHUNKS, EVEN, CENTRED, SINGLE,
    )  # fmt: skip
    resident = 0
    if CHUNKS == 1:
        x = load_channels(x_ptrs, x_channel, 0, d, BLOCK_D, EVEN)
        resident = row_operands(x, mean_ptr, 0, d, BLOCK_D, CENTRED, SINGLE)

    columns = tl.arange(0, BLOCK_K)
    marks = columns + tl.minimum(N, 0).to(tl.int32)  # whole in a register: nothing is known of N
    lower = tl.full((BLOCK_N,), NONE, tl.float32)
    upper = tl.full((BLOCK_N,), INFINITY, tl.float32)
    second = tl.full((BLOCK_N,), NONE, tl.float32)
    index = tl.full((BLOCK_N,), -1, tl.int64)
    first_tile = split * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, tiles)
    for tile in tl.range(bound(first_tile), bound(last_tile)):
        start = tl.cast(tile, tl.int64) * BLOCK_K
        c_ptrs = codes_ptr + tl.minimum(start + columns, K - 1)[:, None] * c_code
        s = products(
            resident, x_ptrs, c_ptrs, x_channel, c_channel, mean_ptr, d,
            BLOCK_N, BLOCK_K, BLOCK_D, CHUNKS, EVEN, CENTRED, SINGLE,
        )  # fmt: skip
        if scale_ptr is not None:
            s *= tl.load(scale_ptr + head * padded_K + start + columns)[None, :]
        bias = tl.load(bias_ptr + start + columns)
        best, next = two_least(packed(bias[None, :] - s, marks[None, :], BLOCK_K), EXACT)
        code = start + (best.to(tl.int32, bitcast=True) & (BLOCK_K - 1))
        there = best < 0.5 * NONE  # false for NaN
        best = tl.where(best == best, best, NONE)
        if EXACT:
            next = tl.where(next == next, next, NONE)
            length, weight = tl.load(tile_ptr + 2 * tile), tl.load(tile_ptr + 2 * tile + 1)
            error = (length * e + weight + f) * SLACK
            low = best - _loss(best, BLOCK_K) - error
            high = best + _loss(best, BLOCK_K) + error
            next -= _loss(next, BLOCK_K) + error
            better = there & ((low < lower) | (index < 0))
            second = tl.minimum(tl.minimum(second, next), tl.where(better, lower, low))
            upper = tl.where(better, high, upper)
            lower = tl.where(better, low, lower)
        else:
            better = there & (best < lower)
            lower = tl.where(better, best, lower)
        index = tl.where(better, code, index)

    index = tl.where(finite, index, BROKEN)
    at = (head * splits + split) * N + rows
    tl.store(lower_ptr + at, lower, mask=rows < N)
    tl.store(index_ptr + at, index, mask=rows < N)
    if EXACT:
        tl.store(upper_ptr + at, tl.where(upper == upper, upper, INFINITY), mask=rows < N)
        tl.store(second_ptr + at, second, mask=rows < N)


@inline
def _loss(score, BLOCK_K: tl.constexpr):
    """What packing may have taken from a score, or given."""
    return tl.abs(score) * (1.0625 * BLOCK_K * 2.0**-23)


@triton.jit(do_not_specialize=["N", "K", "splits"])
def certify_kernel(
    lower_ptr, upper_ptr, second_ptr, index_ptr, first_ptr,
    found_ptr, bar_ptr, list_ptr, count_ptr,
    N, K, splits,
    EXACT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """found [H, N] of rows whose nearest code is certain. The others are listed [H, N] and counted
    [H]; no score above a row's bar [H, N] is of its nearest code."""
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    lower = tl.full((BLOCK_N,), NONE, tl.float32)
    upper = tl.full((BLOCK_N,), INFINITY, tl.float32)
    second = tl.full((BLOCK_N,), NONE, tl.float32)
    index = tl.full((BLOCK_N,), -1, tl.int64)
    for split in tl.range(0, bound(splits)):
        at = (head * splits + split) * N + rows
        low = tl.load(lower_ptr + at, mask=inside, other=NONE)
        code = tl.load(index_ptr + at, mask=inside, other=-1)
        better = (code != -1) & ((low < lower) | (index == -1))
        if EXACT:
            next = tl.load(second_ptr + at, mask=inside, other=NONE)
            second = tl.minimum(tl.minimum(second, next), tl.where(better, lower, low))
            high = tl.load(upper_ptr + at, mask=inside, other=INFINITY)
            upper = tl.where(better, high, upper)
        lower = tl.where(better, low, lower)
        index = tl.where(better, code, index)

    finite = index != BROKEN
    if EXACT:
        tl.store(bar_ptr + head * N + rows, upper, mask=inside)
        open_ = inside & finite & ~(upper < second)
        count = tl.sum(open_.to(tl.int32), axis=0)
        if count > 0:
            place = tl.atomic_add(count_ptr + head, count) + tl.cumsum(open_.to(tl.int32)) - 1
            tl.store(list_ptr + head * N + place, rows, mask=open_)
    else:
        first = tl.load(first_ptr + head)
        index = tl.where(index == -1, tl.where(first < K, first, -1), index)
    tl.store(found_ptr + head * N + rows, tl.where(finite, index, -1), mask=inside)
