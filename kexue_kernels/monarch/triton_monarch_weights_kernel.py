"""dw[c, o, i] = sum over m of g[m, c, o] conj(x[m, c, i]), the gradient of a product's weights.

Triton kernels, one for a block per program and one for adjacent blocks, as the products'. Each
split of the rows gives a partial sum in float32; the launcher adds them in order. A third gives the
gradients of a product's rows and weights both.
"""

import triton
import triton.language as tl

from kexue_kernels.monarch.triton_monarch_tiles import (
    conjugate_if,
    index,
    load,
    multiply_add,
    permute,
    store,
    tiles_of,
    zeros,
)
from kexue_kernels.triton_common import inline


@inline
def place(blocks, O, I, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):
    """This program's first block, output and input, and split of the rows. Blocks come first."""
    groups = tiles_of(blocks, BLOCK_C)
    tiles_o, tiles_i = tiles_of(O, BLOCK_O), tiles_of(I, BLOCK_I)
    tile = tl.program_id(0) // groups
    first_c = (tl.program_id(0) % groups).to(tl.int64) * BLOCK_C
    first_o = (tile % tiles_o).to(tl.int64) * BLOCK_O
    first_i = (tile // tiles_o % tiles_i).to(tl.int64) * BLOCK_I
    return first_c, first_o, first_i, (tile // tiles_o // tiles_i).to(tl.int64)


@triton.jit
def block_weights_kernel(
    g_ptr,
    x_ptr,
    dw_ptr,
    rows,
    blocks,
    O,
    I,
    g_m,
    g_c,
    g_o,
    x_m,
    x_c,
    x_i,
    dw_split,
    dw_c,
    dw_o,
    dw_i,
    SPLIT: tl.constexpr,
    COMPLEX: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """SPLIT rows are added up by a program."""
    c, first_o, first_i, split = place(blocks, O, I, 1, BLOCK_O, BLOCK_I)
    m, o, i = index(BLOCK_M, WIDE), index(BLOCK_O, WIDE), index(BLOCK_I, WIDE)
    in_o, in_i = o < O - first_o, i < I - first_i
    left = rows - split * SPLIT
    g_ptr += c * g_c + split * SPLIT * g_m + first_o * g_o
    x_ptr += c * x_c + split * SPLIT * x_m + first_i * x_i
    g_at = o[:, None] * g_o + m[None, :] * g_m
    x_at = m[:, None] * x_m + i[None, :] * x_i
    dw = zeros((BLOCK_O, BLOCK_I), COMPLEX)
    for start in range(0, SPLIT, BLOCK_M):
        in_m = m < left - start
        g = load(g_ptr + g_at, in_o[:, None] & in_m[None, :], COMPLEX)
        x = load(x_ptr + x_at, in_m[:, None] & in_i[None, :], COMPLEX)
        dw = multiply_add(g, conjugate_if(True, x), dw, PRECISION)
        g_ptr += tl.cast(BLOCK_M, tl.int64) * g_m
        x_ptr += tl.cast(BLOCK_M, tl.int64) * x_m
    dw_ptr += split * dw_split + c * dw_c + first_o * dw_o + first_i * dw_i
    store(dw_ptr + o[:, None] * dw_o + i[None, :] * dw_i, dw, in_o[:, None] & in_i[None, :])


@triton.jit
def block_gradients_kernel(
    g_ptr,
    w_ptr,
    x_ptr,
    dx_ptr,
    dw_ptr,
    rows,
    blocks,
    g_m,
    g_c,
    g_o,
    w_c,
    w_o,
    w_i,
    x_m,
    x_c,
    x_i,
    dx_m,
    dx_c,
    dx_i,
    dw_split,
    dw_c,
    dw_o,
    dw_i,
    O: tl.constexpr,
    I: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """As block_weights_kernel, and dx[m, c, i] = sum over o of g[m, c, o] w[c, o, i], g read once.

    All of O and I fit in their blocks.
    """
    c, _, _, split = place(blocks, O, I, 1, BLOCK_O, BLOCK_I)
    m, o, i = index(BLOCK_M, WIDE), index(BLOCK_O, WIDE), index(BLOCK_I, WIDE)
    in_o, in_i = o < O, i < I
    left = rows - split * SPLIT
    in_w = in_o[:, None] & in_i[None, :]
    w = load(w_ptr + c * w_c + o[:, None] * w_o + i[None, :] * w_i, in_w, False)
    g_ptr += c * g_c + split * SPLIT * g_m
    x_ptr += c * x_c + split * SPLIT * x_m
    dx_ptr += c * dx_c + split * SPLIT * dx_m
    g_at = m[:, None] * g_m + o[None, :] * g_o
    x_at = m[:, None] * x_m + i[None, :] * x_i
    dx_at = m[:, None] * dx_m + i[None, :] * dx_i
    dw = zeros((BLOCK_O, BLOCK_I), False)
    for start in range(0, SPLIT, BLOCK_M):
        in_m = m < left - start
        g = load(g_ptr + g_at, in_m[:, None] & in_o[None, :], False)
        x = load(x_ptr + x_at, in_m[:, None] & in_i[None, :], False)
        dx = multiply_add(g, w, zeros((BLOCK_M, BLOCK_I), False), "ieee")
        dw = multiply_add(permute(g, (1, 0)), x, dw, "ieee")
        store(dx_ptr + dx_at, dx, in_m[:, None] & in_i[None, :])
        g_ptr += tl.cast(BLOCK_M, tl.int64) * g_m
        x_ptr += tl.cast(BLOCK_M, tl.int64) * x_m
        dx_ptr += tl.cast(BLOCK_M, tl.int64) * dx_m
    dw_ptr += split * dw_split + c * dw_c
    store(dw_ptr + o[:, None] * dw_o + i[None, :] * dw_i, dw, in_w)


@triton.jit
def adjacent_weights_kernel(
    g_ptr,
    x_ptr,
    dw_ptr,
    rows,
    blocks,
    O,
    I,
    g_m,
    g_c,
    g_o,
    x_m,
    x_c,
    x_i,
    dw_split,
    dw_c,
    dw_o,
    dw_i,
    SPLIT: tl.constexpr,
    COMPLEX: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """SPLIT rows of BLOCK_C adjacent blocks are added up by a program."""
    first_c, first_o, first_i, split = place(blocks, O, I, BLOCK_C, BLOCK_O, BLOCK_I)
    c, m = index(BLOCK_C, WIDE), index(BLOCK_M, WIDE)
    o, i = index(BLOCK_O, WIDE), index(BLOCK_I, WIDE)
    in_c, in_o, in_i = c < blocks - first_c, o < O - first_o, i < I - first_i
    left = rows - split * SPLIT
    g_ptr += first_c * g_c + split * SPLIT * g_m + first_o * g_o
    x_ptr += first_c * x_c + split * SPLIT * x_m + first_i * x_i
    g_at = c[:, None, None] * g_c + o[None, :, None] * g_o + m[None, None, :] * g_m
    x_at = c[:, None, None] * x_c + m[None, :, None] * x_m + i[None, None, :] * x_i
    in_g = in_c[:, None, None] & in_o[None, :, None]
    in_x = in_c[:, None, None] & in_i[None, None, :]
    dw = zeros((BLOCK_C, BLOCK_O, BLOCK_I), COMPLEX)
    for start in range(0, SPLIT, BLOCK_M):
        in_m = m < left - start
        g = load(g_ptr + g_at, in_g & in_m[None, None, :], COMPLEX)
        x = load(x_ptr + x_at, in_x & in_m[None, :, None], COMPLEX)
        dw = multiply_add(g, conjugate_if(True, x), dw, PRECISION)
        g_ptr += tl.cast(BLOCK_M, tl.int64) * g_m
        x_ptr += tl.cast(BLOCK_M, tl.int64) * x_m
    dw_ptr += split * dw_split + first_c * dw_c + first_o * dw_o + first_i * dw_i
    dw_at = c[:, None, None] * dw_c + o[None, :, None] * dw_o + i[None, None, :] * dw_i
    store(dw_ptr + dw_at, dw, in_g & in_i[None, None, :])
