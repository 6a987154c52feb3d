"""y[m, c, o] = sum over i of x[m, c, i] w[c, o, i], plus a bias: Triton kernels.

One takes a block c per program, the other adjacent blocks: for tensors in which c is the fastest
axis, as on either side of a Monarch's second factor, it reads and writes whole sectors.
"""

import triton
import triton.language as tl

from kexue_kernels.monarch.triton_monarch_tiles import (
    add_expanded,
    conjugate_if,
    index,
    load,
    multiply_add,
    permute,
    store,
    tiles_of,
    zeros,
)


@triton.jit
def block_product_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    rows,
    blocks,
    O,
    x_m,
    x_c,
    x_i,
    w_c,
    w_o,
    w_i,
    bias_c,
    bias_o,
    y_m,
    y_c,
    y_o,
    I: tl.constexpr,
    COMPLEX: tl.constexpr,
    CONJUGATE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Programs beside each other read adjacent parts of the same rows. CONJUGATE: w's."""
    program = tl.program_id(0)
    c = (program % blocks).to(tl.int64)
    tile = program // blocks
    tiles = tiles_of(O, BLOCK_O)
    first_m = (tile // tiles).to(tl.int64) * BLOCK_M
    first_o = (tile % tiles).to(tl.int64) * BLOCK_O
    m, o, i = index(BLOCK_M, WIDE), index(BLOCK_O, WIDE), index(BLOCK_I, WIDE)
    in_m, in_o = m < rows - first_m, o < O - first_o
    x_ptr += c * x_c + first_m * x_m
    w_ptr += c * w_c + first_o * w_o
    x_at = m[:, None] * x_m + i[None, :] * x_i
    w_at = i[:, None] * w_i + o[None, :] * w_o
    y = zeros((BLOCK_M, BLOCK_O), COMPLEX)
    for start in range(0, I, BLOCK_I):
        in_i = i < I - start
        x = load(x_ptr + x_at, in_m[:, None] & in_i[None, :], COMPLEX)
        w = load(w_ptr + w_at, in_i[:, None] & in_o[None, :], COMPLEX)
        y = multiply_add(x, conjugate_if(CONJUGATE, w), y, PRECISION)
        x_ptr += tl.cast(BLOCK_I, tl.int64) * x_i
        w_ptr += tl.cast(BLOCK_I, tl.int64) * w_i
    if bias_ptr is not None:
        bias_ptr += c * bias_c + first_o * bias_o
        y = add_expanded(y, load(bias_ptr + o * bias_o, in_o, COMPLEX), 0)
    y_ptr += c * y_c + first_m * y_m + first_o * y_o
    store(y_ptr + m[:, None] * y_m + o[None, :] * y_o, y, in_m[:, None] & in_o[None, :])


@triton.jit
def adjacent_product_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    rows,
    blocks,
    O,
    x_m,
    x_c,
    x_i,
    w_c,
    w_o,
    w_i,
    bias_c,
    bias_o,
    y_m,
    y_c,
    y_o,
    I: tl.constexpr,
    COMPLEX: tl.constexpr,
    CONJUGATE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A program has BLOCK_C adjacent blocks. CONJUGATE: w's."""
    groups = tiles_of(blocks, BLOCK_C)
    program = tl.program_id(0)
    first_c = (program % groups).to(tl.int64) * BLOCK_C
    tile = program // groups
    tiles = tiles_of(O, BLOCK_O)
    first_m = (tile // tiles).to(tl.int64) * BLOCK_M
    first_o = (tile % tiles).to(tl.int64) * BLOCK_O
    c, m = index(BLOCK_C, WIDE), index(BLOCK_M, WIDE)
    o, i = index(BLOCK_O, WIDE), index(BLOCK_I, WIDE)
    in_c, in_m, in_o = c < blocks - first_c, m < rows - first_m, o < O - first_o
    in_cm = in_c[:, None, None] & in_m[None, :, None]
    in_co = in_c[:, None, None] & in_o[None, None, :]
    x_ptr += first_c * x_c + first_m * x_m
    w_ptr += first_c * w_c + first_o * w_o
    x_at = c[:, None, None] * x_c + m[None, :, None] * x_m + i[None, None, :] * x_i
    w_at = c[:, None, None] * w_c + i[None, :, None] * w_i + o[None, None, :] * w_o
    y = zeros((BLOCK_C, BLOCK_M, BLOCK_O), COMPLEX)
    for start in range(0, I, BLOCK_I):
        in_i = i < I - start
        x = load(x_ptr + x_at, in_cm & in_i[None, None, :], COMPLEX)
        w = load(w_ptr + w_at, in_co & in_i[None, :, None], COMPLEX)
        y = multiply_add(x, conjugate_if(CONJUGATE, w), y, PRECISION)
        x_ptr += tl.cast(BLOCK_I, tl.int64) * x_i
        w_ptr += tl.cast(BLOCK_I, tl.int64) * w_i
    if bias_ptr is not None:
        bias_ptr += first_c * bias_c + first_o * bias_o
        at = c[:, None] * bias_c + o[None, :] * bias_o
        y = add_expanded(y, load(bias_ptr + at, in_c[:, None] & in_o[None, :], COMPLEX), 1)
    y_ptr += first_c * y_c + first_m * y_m + first_o * y_o
    y_at = m[:, None, None] * y_m + o[None, :, None] * y_o + c[None, None, :] * y_c
    in_y = in_m[:, None, None] & in_o[None, :, None] & in_c[None, None, :]
    store(y_ptr + y_at, permute(y, (1, 2, 0)), in_y)  # c fastest
