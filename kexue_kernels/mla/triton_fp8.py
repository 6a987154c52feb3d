"""Rows of fp8.py in Triton: codes to numbers and back by their bits.

sm_80 has no instructions for float8_e4m3fn, of a sign, 4 bits of exponent and 3 of fraction.
"""

import triton.language as tl

from kexue_kernels.mla import fp8
from kexue_kernels.triton_common import inline, narrow

TILE = tl.constexpr(fp8.TILE)
LARGEST = tl.constexpr(fp8.LARGEST)
SMALLEST = tl.constexpr(fp8.SMALLEST)
SIGNS = tl.constexpr(-0x7FFF8000)  # of two float16
RESTS = tl.constexpr(0x3F803F80)
ROUNDER = tl.constexpr(16384.0)  # float32 from here on are multiples of the least code, 2^-9


@inline
def decode_e4m3(words, shape: tl.constexpr):
    """2^-8 times what codes stand for, float32 in `shape`: words are int32, of four codes each.

    A float16 has one more bit of exponent, with a bias larger by 8, for subnormal codes too.
    """
    even = ((words << 8) & SIGNS) | ((words << 7) & RESTS)
    odd = (words & SIGNS) | ((words >> 1) & RESTS)
    codes = tl.join(_halves(even), _halves(odd))  # [..., 2, 2]
    return tl.reshape(codes, shape).to(tl.float32)


@inline
def _halves(pair):
    """float16 [..., 2] of the two in each int32."""
    pair = pair | ((pair + 0x00800080) & 0x40004000)  # a code of ones, NaN, has ones in float16
    low, high = pair.to(tl.int16), (pair >> 16).to(tl.int16)
    return tl.join(low.to(tl.float16, bitcast=True), high.to(tl.float16, bitcast=True))


@inline
def encode_e4m3(x):
    """The nearest codes, uint8, of float32 up to 448 in magnitude, ties to even."""
    magnitude = tl.abs(x)
    bits = magnitude.to(tl.int32, bitcast=True)
    rounded = bits + 0x7FFFF + ((bits >> 20) & 1)
    normal = (rounded >> 20) - (120 << 3)  # of the exponents' biases, 127 - 7
    subnormal = (magnitude + ROUNDER).to(tl.int32, bitcast=True) & 0xF
    codes = tl.where(magnitude < 0.015625, subnormal, normal)
    codes = tl.where(x == x, codes, 0x7F)
    return (codes | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@inline
def key_pointers(row_ptrs, dc):
    """Where the keys of rows begin, bfloat16."""
    return (row_ptrs + dc // 32 * 33).to(tl.pointer_type(tl.bfloat16), bitcast=True)


@inline
def load_latents(row_ptrs, dc, rows, N: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """bfloat16 [N, BLOCK] of N rows, 0 beyond dc columns and where not of `rows`, [N, 1]."""
    tile = tl.arange(0, BLOCK // TILE)[None, :]
    kept = rows if EVEN else rows & (tile * TILE < dc)
    word_ptrs = row_ptrs.to(tl.pointer_type(tl.int32), bitcast=True)
    words = (tile * (TILE // 4))[:, :, None] + tl.arange(0, TILE // 4)[None, None, :]
    words = tl.load(word_ptrs[:, :, None] + words, mask=kept[:, :, None], other=0)
    scale_ptrs = (row_ptrs + dc).to(tl.pointer_type(tl.float32), bitcast=True)
    scales = tl.load(scale_ptrs + tile, mask=kept, other=0.0) * 256
    numbers = decode_e4m3(words, (N, BLOCK // TILE, TILE)) * scales[:, :, None]
    return tl.reshape(narrow(numbers, tl.bfloat16), (N, BLOCK))


@inline
def store_latent(row_ptr, x, dc, BLOCK: tl.constexpr):
    """Codes and scales of x, float32 [BLOCK], 0 beyond dc columns."""
    tiles = tl.reshape(x, (BLOCK // TILE, TILE))
    tile = tl.arange(0, BLOCK // TILE)
    lacking = tl.sum((tiles != tiles).to(tl.int32), axis=1) > 0
    scales = tl.maximum(tl.div_rn(tl.max(tl.abs(tiles), axis=1), LARGEST), SMALLEST)
    scales = tl.where(lacking, float("nan"), scales)
    codes = encode_e4m3(tiles * tl.div_rn(1.0, scales)[:, None])
    columns = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    tl.store(row_ptr + columns, codes, mask=columns < dc)
    scale_ptr = (row_ptr + dc).to(tl.pointer_type(tl.float32), bitcast=True)
    tl.store(scale_ptr + tile, scales, mask=tile * TILE < dc)
