"""Rows of nearest_codebook that were not certified, once more: by the definition, in float64.

A fixed number of programs shares the rows listed, and where those are few, the codes of each
block of rows, too. All programs know how many rows there are from the count on the device.
"""

import triton
import triton.language as tl

from kexue_kernels.triton_common import bound, inline
from kexue_kernels.vq.triton_nearest_codebook_scores import (
    SLACK,
    load_channels,
    products,
    row_bounds,
    row_operands,
)


@inline
def shares(count_ptr, programs, tiles, BLOCK_N: tl.constexpr):
    """How many rows there are, blocks of them, and programs for each block."""
    count = tl.load(count_ptr)
    blocks = tl.cdiv(count, BLOCK_N)
    return count, blocks, tl.minimum(tl.maximum(programs // tl.maximum(blocks, 1), 1), tiles)


@inline
def exact_costs(
    x_ptrs, c_ptrs, x_channel, c_channel, d,
    L2: tl.constexpr, COSINE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """What the nearest code has least of, for BLOCK_N pairs. Each sum is made in one order,
    with no operation left to be fused or not: equal codes have equal costs, bit for bit."""
    sums = tl.zeros((BLOCK_N, BLOCK_E), tl.float64)
    squares = tl.zeros((BLOCK_N, BLOCK_E), tl.float64)
    for chunk in tl.range(0, bound(tl.cdiv(d, BLOCK_E))):
        first = chunk * BLOCK_E
        x = load_channels(x_ptrs, x_channel, first, d, BLOCK_E, False)
        c = load_channels(c_ptrs, c_channel, first, d, BLOCK_E, False)
        x, c = x.to(tl.float32).to(tl.float64), c.to(tl.float32).to(tl.float64)
        if L2:
            x -= c
            sums = tl.fma(x, x, sums)
        else:
            sums = tl.fma(x, c, sums)
        if COSINE:
            squares = tl.fma(c, c, squares)
    total = tl.sum(sums, axis=1)
    if COSINE:
        norm = tl.sqrt(tl.sum(squares, axis=1))
        return tl.where(norm > 0, -total / tl.where(norm > 0, norm, 1.0), 0.0)
    elif L2:
        return total
    else:
        return -total


@triton.jit(do_not_specialize=["N", "K", "room"])
def recheck_kernel(
    x_ptr, codes_ptr, mean_ptr, bias_ptr, scale_ptr, tile_ptr,
    bar_ptr, list_ptr, count_ptr, cost_ptr, index_ptr,
    N, K, d, room,
    x_head, x_row, x_channel, c_head, c_code, c_channel,
    eps, shared, tiny,
    L2: tl.constexpr, CENTRED: tl.constexpr, SINGLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    CHUNKS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The least cost and its code, of each listed row and share of the codes [H, room, BLOCK_N]."""
    head = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(K, BLOCK_K)
    count, blocks, parts = shares(count_ptr + head, tl.num_programs(0), tiles, BLOCK_N)
    if CENTRED:
        mean_ptr += head * d
    padded_K = tl.cast(tiles, tl.int64) * BLOCK_K
    bias_ptr += head * padded_K
    tile_ptr += 2 * head * tiles
    codes_ptr += head * c_head
    columns = tl.arange(0, BLOCK_K)
    for item in tl.range(bound(tl.program_id(0)), bound(blocks * parts), bound(tl.num_programs(0))):
        places = item % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = tl.load(list_ptr + head * N + tl.minimum(places, count - 1))
        bar = tl.load(bar_ptr + head * N + rows)
        x_ptrs = x_ptr + head * x_head + rows[:, None] * x_row
        e, f, _ = row_bounds(
            x_ptrs, x_channel, mean_ptr, d, eps, shared, tiny,
            BLOCK_N, BLOCK_D, CHUNKS, EVEN, CENTRED, SINGLE,
        )  # fmt: skip
        resident = 0
        if CHUNKS == 1:
            x = load_channels(x_ptrs, x_channel, 0, d, BLOCK_D, EVEN)
            resident = row_operands(x, mean_ptr, 0, d, BLOCK_D, CENTRED, SINGLE)
        least = tl.full((BLOCK_N,), float("inf"), tl.float64)
        index = tl.full((BLOCK_N,), -1, tl.int64)
        share = tl.cdiv(tiles, parts)
        first_tile = item // blocks * share
        last_tile = tl.minimum(first_tile + share, tiles)
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
            length, weight = tl.load(tile_ptr + 2 * tile), tl.load(tile_ptr + 2 * tile + 1)
            error = (length * e + weight + f) * SLACK
            beyond = (bias[None, :] - s) - error[:, None] > bar[:, None]  # false for NaN
            possible = (bias == bias) & (start + columns < K)
            # Candidates in ascending order, those of all rows side by side.
            column = tl.where(beyond | ~possible[None, :], BLOCK_K, columns[None, :])
            last = tl.min(column, axis=1)
            while tl.min(last, axis=0) < BLOCK_K:
                code = tl.minimum(start + last, K - 1)
                cost = exact_costs(
                    x_ptrs, codes_ptr + code[:, None] * c_code, x_channel, c_channel, d,
                    L2, scale_ptr is not None, BLOCK_N, BLOCK_E,
                )  # fmt: skip
                better = (last < BLOCK_K) & ((cost < least) | (index < 0))
                least = tl.where(better, cost, least)
                index = tl.where(better, code, index)
                last = tl.min(tl.where(column > last[:, None], column, BLOCK_K), axis=1)
        at = (head * room + item) * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(cost_ptr + at, least)
        tl.store(index_ptr + at, index)


@triton.jit(do_not_specialize=["N", "room", "programs", "tiles"])
def settle_kernel(
    list_ptr, count_ptr, cost_ptr, index_ptr, found_ptr, N, room, programs, tiles,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """found [H, N] of the rows listed: the least cost of all shares, the first of equals."""
    head = tl.program_id(1).to(tl.int64)
    count, blocks, parts = shares(count_ptr + head, programs, tiles, BLOCK_N)
    for block in tl.range(bound(tl.program_id(0)), bound(blocks), bound(tl.num_programs(0))):
        places = block * BLOCK_N + tl.arange(0, BLOCK_N)
        least = tl.full((BLOCK_N,), float("inf"), tl.float64)
        index = tl.full((BLOCK_N,), -1, tl.int64)
        for part in tl.range(0, bound(parts)):
            at = (head * room + part * blocks + block) * BLOCK_N + tl.arange(0, BLOCK_N)
            cost, code = tl.load(cost_ptr + at), tl.load(index_ptr + at)
            better = (code >= 0) & ((cost < least) | (index < 0))
            least = tl.where(better, cost, least)
            index = tl.where(better, code, index)
        rows = tl.load(list_ptr + head * N + tl.minimum(places, count - 1))
        tl.store(found_ptr + head * N + rows, index, mask=places < count)
