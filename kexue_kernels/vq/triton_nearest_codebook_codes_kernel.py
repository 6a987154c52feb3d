"""What nearest_codebook's kernels need to know of the codes: a mean, and bounds of each tile."""

import triton
import triton.language as tl

from kexue_kernels.triton_common import bound
from kexue_kernels.vq.triton_nearest_codebook_scores import (
    FLOOR,
    INFINITY,
    LONGEST,
    NAN,
    SLACK,
    centred,
    load_channels,
)

SHORTEST = tl.constexpr(2.0**-40)  # of codes that float32 can normalise


@triton.jit(do_not_specialize=["K", "step"])
def mean_kernel(
    codes_ptr, mean_ptr, K, d, step, c_head, c_code, c_channel, RATIO,
    SAMPLES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """mean [H, d], in float32 a number of the codes' dtype: of every step-th code, where that
    makes their square RATIO times less and more; else 0. Any number would be right."""
    head = tl.program_id(1).to(tl.int64)
    channels = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    codes = tl.arange(0, SAMPLES).to(tl.int64) * step
    ptrs = codes_ptr + head * c_head + codes[:, None] * c_code
    inside = (codes < K)[:, None] & (channels < d)[None, :]
    c = tl.load(ptrs + channels.to(tl.int64)[None, :] * c_channel, mask=inside, other=NAN)
    c = c.to(tl.float32)
    good = tl.abs(c) <= LONGEST
    count = tl.maximum(tl.sum(good.to(tl.float32), axis=0), 1.0)
    mean = tl.sum(tl.where(good, c, 0.0), axis=0) / count
    rest = tl.where(good, c - mean[None, :], 0.0)
    helps = mean * mean > RATIO * tl.sum(rest * rest, axis=0) / count
    mean = tl.where(helps, mean, 0.0).to(codes_ptr.dtype.element_ty).to(tl.float32)
    tl.store(mean_ptr + head * d + channels, mean, mask=channels < d)


@triton.jit(do_not_specialize=["K", "tiles"])
def codes_kernel(
    codes_ptr, mean_ptr, bias_ptr, scale_ptr, tile_ptr, first_ptr, count_ptr,
    K, d, tiles, c_head, c_code, c_channel, eps, absent,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, L2: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """bias (`absent` past the last code) and for cosine scale [H, tiles * BLOCK_K]; of each tile
    the greatest length and E's share of the greatest bias [H, tiles, 2]; the first finite code
    [H], before it K; count = 0."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    codes = tile.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = codes < K
    ptrs = codes_ptr + head * c_head + tl.minimum(codes, K - 1)[:, None] * c_code
    if L2:
        mean_ptr += head * d
    if tile == 0:
        tl.store(count_ptr + head, 0)
    square = tl.zeros((BLOCK_K,), tl.float32)
    apart = tl.zeros((BLOCK_K,), tl.float32)  # from the mean, squared
    most = tl.zeros((BLOCK_K,), tl.float32)
    broken = tl.zeros((BLOCK_K,), tl.int32)
    for chunk in tl.range(0, bound(tl.cdiv(d, BLOCK_D))):
        first = chunk * BLOCK_D
        c = load_channels(ptrs, c_channel, first, d, BLOCK_D, False)
        rest = centred(c, mean_ptr, first, d, BLOCK_D, L2)
        c = c.to(tl.float32)
        broken += tl.sum(tl.where(tl.abs(c) < INFINITY, 0, 1), axis=1)
        most = tl.maximum(most, tl.max(tl.abs(c), axis=1))
        square += tl.sum(c * c, axis=1)
        apart += tl.sum(rest * rest, axis=1)
    norm = tl.sqrt(square)
    finite = inside & (broken == 0)
    fits = (norm <= LONGEST) & (apart <= LONGEST * LONGEST)
    bias = tl.zeros((BLOCK_K,), tl.float32)
    if L2:
        length = tl.sqrt(apart) if SINGLE else norm
        bias = apart / 2
    elif scale_ptr is not None:
        length = tl.where(most > 0, 1.0, 0.0)
        fits &= (norm >= SHORTEST) | (most == 0)
        scale = tl.where(fits & (most > 0), 1 / norm, 0.0)
        tl.store(scale_ptr + head * tiles * BLOCK_K + codes, scale)
    else:
        length = norm
    tl.store(
        bias_ptr + head * tiles * BLOCK_K + codes,
        tl.where(finite, tl.where(fits, bias, INFINITY), tl.where(inside, NAN, absent)),
    )
    length = tl.where(finite, tl.where(fits, length, INFINITY), 0.0)
    out_ptr = tile_ptr + 2 * (head * tiles + tile)
    tl.store(out_ptr, tl.max(length, axis=0) * SLACK + d * FLOOR)
    weight = tl.where(finite & fits, bias, 0.0)
    tl.store(out_ptr + 1, eps * tl.max(weight, axis=0) * SLACK)
    found = tl.min(tl.where(finite, codes, K), axis=0)
    if found < K:
        tl.atomic_min(first_ptr + head, found)
