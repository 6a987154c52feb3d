"""Both factors of a Monarch in one Triton kernel: what passes between them stays on chip.

    z[m, a, c] = sum over i of x[m, a, i] u[a, c, i]
    y[m, c, o] = sum over a of z[m, a, c] v[c, o, a]  (+ bias)

With u = w1, v = w2 (a = k = r, c = q = l) this is the Monarch, with the factors' roles and axes
exchanged its transpose, which takes gradients of y to those of x. One kernel fetches the factors
for every tile of rows, the other keeps them on chip while one tile after another passes.
"""

import triton
import triton.language as tl

from kexue_kernels.monarch.triton_monarch_tiles import (
    add_expanded,
    cast,
    index,
    load,
    multiply_add,
    permute,
    store,
    tiles_of,
    zeros,
)
from kexue_kernels.triton_common import bound


@triton.jit
def fused_kernel(
    x_ptr,
    u_ptr,
    v_ptr,
    bias_ptr,
    y_ptr,
    rows,
    outer,
    x_m,
    x_a,
    x_i,
    u_a,
    u_c,
    u_i,
    v_c,
    v_o,
    v_a,
    bias_c,
    bias_o,
    y_m,
    y_c,
    y_o,
    A: tl.constexpr,
    I: tl.constexpr,
    O: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
    STORE_C_LAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A program has BLOCK_C of `outer` values of c. I fits in BLOCK_I, O in BLOCK_O."""
    groups = tiles_of(outer, BLOCK_C)
    program = tl.program_id(0)
    first_m = (program // groups).to(tl.int64) * BLOCK_M
    first_c = (program % groups).to(tl.int64) * BLOCK_C
    m, c = index(BLOCK_M, WIDE), index(BLOCK_C, WIDE)
    a, i, o = index(BLOCK_A, WIDE), index(BLOCK_I, WIDE), index(BLOCK_O, WIDE)
    in_m, in_c, in_i, in_o = m < rows - first_m, c < outer - first_c, i < I, o < O
    x_ptr += first_m * x_m
    u_ptr += first_c * u_c
    v_ptr += first_c * v_c
    x_at = a[:, None, None] * x_a + m[None, :, None] * x_m + i[None, None, :] * x_i
    u_at = a[:, None, None] * u_a + i[None, :, None] * u_i + c[None, None, :] * u_c
    v_at = c[:, None, None] * v_c + a[None, :, None] * v_a + o[None, None, :] * v_o
    in_x = in_m[None, :, None] & in_i[None, None, :]
    in_u = in_i[None, :, None] & in_c[None, None, :]
    in_v = in_c[:, None, None] & in_o[None, None, :]
    y = zeros((BLOCK_C, BLOCK_M, BLOCK_O), False)
    for start in range(0, A, BLOCK_A):
        in_a = a < A - start
        x = load(x_ptr + x_at, in_a[:, None, None] & in_x, False)
        u = load(u_ptr + u_at, in_a[:, None, None] & in_u, False)
        z = multiply_add(x, u, zeros((BLOCK_A, BLOCK_M, BLOCK_C), False), "ieee")
        z = permute(cast(z, x_ptr.dtype.element_ty), (2, 1, 0))  # [C, M, A]
        v = load(v_ptr + v_at, in_a[None, :, None] & in_v, False)
        y = multiply_add(z, v, y, "ieee")
        x_ptr += tl.cast(BLOCK_A, tl.int64) * x_a
        u_ptr += tl.cast(BLOCK_A, tl.int64) * u_a
        v_ptr += tl.cast(BLOCK_A, tl.int64) * v_a
    if bias_ptr is not None:
        in_bias = in_c[:, None] & in_o[None, :]
        bias = load(
            bias_ptr + first_c * bias_c + c[:, None] * bias_c + o[None, :] * bias_o, in_bias, False
        )
        y = add_expanded(y, bias, 1)
    y_ptrs = y_ptr + first_m * y_m + first_c * y_c + m[:, None, None] * y_m
    if STORE_C_LAST:
        y_ptrs += o[None, :, None] * y_o + c[None, None, :] * y_c
        in_y = in_m[:, None, None] & in_o[None, :, None] & in_c[None, None, :]
        store(y_ptrs, permute(y, (1, 2, 0)), in_y)
    else:
        y_ptrs += c[None, :, None] * y_c + o[None, None, :] * y_o
        in_y = in_m[:, None, None] & in_c[None, :, None] & in_o[None, None, :]
        store(y_ptrs, permute(y, (1, 0, 2)), in_y)


@triton.jit
def resident_fused_kernel(
    x_ptr,
    u_ptr,
    v_ptr,
    bias_ptr,
    y_ptr,
    rows,
    outer,
    x_m,
    x_a,
    x_i,
    u_a,
    u_c,
    u_i,
    v_c,
    v_o,
    v_a,
    bias_c,
    bias_o,
    y_m,
    y_c,
    y_o,
    A: tl.constexpr,
    I: tl.constexpr,
    O: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """What `fused_kernel` does, c fastest in y. All of A, I and O fit in their blocks.

    A program has BLOCK_C of `outer` values of c, and every so many-th tile of rows.
    """
    groups = tiles_of(outer, BLOCK_C)
    first_c = (tl.program_id(0) % groups).to(tl.int64) * BLOCK_C
    m, c = index(BLOCK_M, WIDE), index(BLOCK_C, WIDE)
    a, i, o = index(BLOCK_A, WIDE), index(BLOCK_I, WIDE), index(BLOCK_O, WIDE)
    in_a, in_c, in_i, in_o = a < A, c < outer - first_c, i < I, o < O
    u_at = a[:, None, None] * u_a + c[None, :, None] * u_c + i[None, None, :] * u_i
    v_at = c[:, None, None] * v_c + o[None, :, None] * v_o + a[None, None, :] * v_a
    in_u = in_a[:, None, None] & in_c[None, :, None] & in_i[None, None, :]
    in_v = in_c[:, None, None] & in_o[None, :, None] & in_a[None, None, :]
    u = load(u_ptr + first_c * u_c + u_at, in_u, False)
    v = load(v_ptr + first_c * v_c + v_at, in_v, False)
    x_at = a[:, None, None] * x_a + i[None, :, None] * x_i + m[None, None, :] * x_m
    y_at = m[:, None, None] * y_m + o[None, :, None] * y_o + c[None, None, :] * y_c
    in_x = in_a[:, None, None] & in_i[None, :, None]
    in_y = in_o[None, :, None] & in_c[None, None, :]
    y_ptr += first_c * y_c
    first, step = tl.program_id(0) // groups, tl.num_programs(0) // groups
    for tile in tl.range(bound(first), bound(tiles_of(rows, BLOCK_M)), bound(step)):
        first_m = tl.cast(tile, tl.int64) * BLOCK_M
        in_m = m < rows - first_m
        x = load(x_ptr + first_m * x_m + x_at, in_x & in_m[None, None, :], False)
        z = multiply_add(u, x, zeros((BLOCK_A, BLOCK_C, BLOCK_M), False), "ieee")
        z = permute(cast(z, x_ptr.dtype.element_ty), (1, 0, 2))  # [C, A, M]
        y = multiply_add(v, z, zeros((BLOCK_C, BLOCK_O, BLOCK_M), False), "ieee")
        if bias_ptr is not None:
            bias_at = (first_c + c[:, None]) * bias_c + o[None, :] * bias_o
            bias = load(bias_ptr + bias_at, in_c[:, None] & in_o[None, :], False)
            y = add_expanded(y, bias, 2)
        y = permute(cast(y, y_ptr.dtype.element_ty), (2, 1, 0))
        store(y_ptr + first_m * y_m + y_at, y, in_m[:, None, None] & in_y)
