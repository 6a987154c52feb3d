"""y[m, c, o] = sum over i of x[m, c, i] w[c, o, i], plus a bias: Triton kernels.

One takes a block c per program, the other adjacent blocks: for tensors in which c is the fastest
axis, as on either side of a Monarch's second factor, it reads and writes whole sectors. A third,
for adjacent blocks in the result alone, keeps its weights on chip while tiles of rows pass.
"""

import triton
import triton.language as tl

from kexue_kernels.monarch.triton_monarch_tiles import (
    add_expanded,
    cast,
    conjugate_if,
    in_panels,
    index,
    load,
    multiply_add,
    permute,
    store,
    tiles_of,
    zeros,
)
from kexue_kernels.triton_common import bound, inline


@inline
def place(blocks, O, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr):
    """This program's first block, tile of rows and first output. Blocks come first."""
    groups, tiles = tiles_of(blocks, BLOCK_C), tiles_of(O, BLOCK_O)
    program = tl.program_id(0)
    first_c = (program % groups).to(tl.int64) * BLOCK_C
    first_o = (program // groups % tiles).to(tl.int64) * BLOCK_O
    return first_c, program // groups // tiles, first_o


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
    PANEL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Programs beside each other read adjacent parts of the same rows. CONJUGATE: w's.

    PANEL: y, if it isn't 0, has panels of that many rows, rows fastest and y_m apart. Rows past the
    end are stored as well: numbers of no account, as no reader looks at what becomes of them.
    """
    c, tile, first_o = place(blocks, O, 1, BLOCK_O)
    first_m = tile.to(tl.int64) * BLOCK_M
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
    y_ptr += c * y_c + first_o * y_o
    if PANEL:
        y_ptr += in_panels(tile, y_m, PANEL, BLOCK_M)
        store(y_ptr + m[:, None] + o[None, :] * y_o, y, in_o[None, :])
    else:
        y_ptr += first_m * y_m
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
    first_c, tile, first_o = place(blocks, O, BLOCK_C, BLOCK_O)
    first_m = tile.to(tl.int64) * BLOCK_M
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


@triton.jit
def resident_product_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    rows,
    blocks,
    O,
    x_panel,
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
    PANEL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What `adjacent_product_kernel` does, c fastest in y and I in its block.

    x has panels of PANEL rows, rows fastest; those past the end may be read. A program has
    BLOCK_C adjacent blocks, BLOCK_O outputs of each, and every so many-th tile of rows.
    """
    first_c, first, first_o = place(blocks, O, BLOCK_C, BLOCK_O)
    step = tl.num_programs(0) // (tiles_of(blocks, BLOCK_C) * tiles_of(O, BLOCK_O))
    m, c = index(BLOCK_M, WIDE), index(BLOCK_C, WIDE)
    o, i = index(BLOCK_O, WIDE), index(BLOCK_I, WIDE)
    in_c, in_o, in_i = c < blocks - first_c, o < O - first_o, i < I
    w_at = c[:, None, None] * w_c + o[None, :, None] * w_o + i[None, None, :] * w_i
    in_w = in_c[:, None, None] & in_o[None, :, None] & in_i[None, None, :]
    w = load(w_ptr + first_c * w_c + first_o * w_o + w_at, in_w, False)
    x_at = c[:, None, None] * x_c + i[None, :, None] * x_i + m[None, None, :]
    y_at = m[:, None, None] * y_m + o[None, :, None] * y_o + c[None, None, :] * y_c
    in_x = in_c[:, None, None] & in_i[None, :, None]
    in_y = in_o[None, :, None] & in_c[None, None, :]
    x_ptr += first_c * x_c
    y_ptr += first_c * y_c + first_o * y_o
    for tile in tl.range(bound(first), bound(tiles_of(rows, BLOCK_M)), bound(step)):
        first_m = tl.cast(tile, tl.int64) * BLOCK_M
        in_m = m < rows - first_m
        x = load(x_ptr + in_panels(tile, x_panel, PANEL, BLOCK_M) + x_at, in_x, False)
        y = multiply_add(w, x, zeros((BLOCK_C, BLOCK_O, BLOCK_M), False), "ieee")
        if bias_ptr is not None:
            bias_at = (first_c + c[:, None]) * bias_c + (first_o + o[None, :]) * bias_o
            bias = load(bias_ptr + bias_at, in_c[:, None] & in_o[None, :], False)
            y = add_expanded(y, bias, 2)
        y = permute(cast(y, y_ptr.dtype.element_ty), (2, 1, 0))
        store(y_ptr + first_m * y_m + y_at, y, in_m[:, None, None] & in_y)
