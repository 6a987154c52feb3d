"""selective_scan's forward kernel.

A program owns BLOCK_D channels of a split of one batch row's steps, with all N states of each,
and walks the steps in order. Small n: a thread then owns whole channels, so that sums over n need
no other thread. A group of RUN steps is read at once, and the data of the next one ahead of time.

Packed sequences may begin anywhere: the state is exchanged where one does.
"""

import triton
import triton.language as tl

from kexue_kernels.scan.triton_selective_maths import (
    decay,
    load_number,
    real_of_product,
    scale,
    scaled_for_exp2,
    sigmoid,
    softplus,
    store_number,
)
from kexue_kernels.triton_common import constant, inline, multiply_add


@inline
def place(d, groups, splits, BLOCK_D: tl.constexpr, VECTOR: tl.constexpr = 1):
    """This program's row of (batch, split), its parts, its block of channels among all, their
    group, the channels [BLOCK_D], and which of them exist. VECTOR divides a group's channels."""
    size = d // groups
    per_group = tl.cdiv(size, BLOCK_D)
    blocks = per_group * groups
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    group = (block // per_group).to(tl.int64)
    inner = (block % per_group) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.multiple_of(group * size, VECTOR)
    return row, row // splits, row % splits, block, group, first + inner, inner < size


@inline
def hidden_zero(t):
    """0, but the compiler can't know, for a step t. It would compute addresses that are rarely
    needed ahead of time, and keep them in registers."""
    return t >> 62


@inline
def _in_states(row, columns, held, d, n, one, N: tl.constexpr):
    """Offsets [N, BLOCK_D] of a row's states in [rows, d, n], and which there are."""
    states = tl.arange(0, N)[:, None] + hidden_zero(row)
    return (row * d + columns[None, :]) * n + states * one, (states < n) & held[None, :]


@inline
def _in_kept(row, columns, held, d, n, one, N: tl.constexpr):
    """The same in [rows, n, d]."""
    states = tl.arange(0, N)[:, None] + hidden_zero(row)
    return (row * n + states) * d + columns[None, :] * one, (states < n) & held[None, :]


@inline
def load_rows(ptrs, step, left, held, RUN: tl.constexpr):
    """RUN steps, `left` of which exist, from `ptrs` [BLOCK_D] on, as a tuple."""
    rows = ()
    for r in tl.static_range(RUN):
        rows = rows + (tl.load(ptrs, mask=held & (r < left), other=0.0),)
        ptrs += step
    return rows


@inline
def steps_of(delta, bias, inside, SOFTPLUS: tl.constexpr):
    """dt; 0 outside, where nothing is to happen."""
    dt = delta.to(tl.float32) + bias
    if SOFTPLUS:
        dt = softplus(dt)
    return tl.where(inside, dt, 0.0)


@inline
def load_parameter(ptr, columns, held):
    """[BLOCK_D] of D or delta_bias; zeros without."""
    if ptr is None:
        return tl.zeros(columns.shape, tl.float32)
    else:
        return tl.load(ptr + columns, mask=held, other=0.0)


@inline
def border(code):
    """A step's packed sequence, and whether it begins and ends there, from what `borders_ptr` has
    for the step."""
    return (code >> 2).to(tl.int64), (code & 2) != 0, (code & 1) != 0


@triton.jit(
    do_not_specialize=["L", "d", "n", "groups", "splits", "split_length", "one"],
)
def selective_scan_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr,
    initial_ptr, leaving_ptr, borders_ptr, out_ptr, final_ptr, checkpoints_ptr,
    L, d, n, groups, splits, split_length, one,
    u_batch, u_step, u_channel, delta_batch, delta_step, delta_channel,
    z_batch, z_step, z_channel,
    SOFTPLUS: tl.constexpr, COMPLEX: tl.constexpr,
    B_INVARIANT: tl.constexpr, C_INVARIANT: tl.constexpr,
    CHUNK: tl.constexpr, RUN: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [batch, L, d], final [S, d, n] and checkpoints [batch, chunks, n, d], the latter two
    optional, from u, delta and z by strides and the rest contiguous.

    B and C are float32 (COMPLEX: in pairs) [batch, L, groups, N], zero past n, or INVARIANT
    [d, n]. leaving [batch, splits, n, d] are the states after each split, None with one split.
    borders [L] tells each step's packed sequence. `one` is 1, but the compiler can't know: it
    would see whole vectors of channels, and spread the states of a channel over threads.
    """
    row, batch, split, _, group, columns, held = place(d, groups, splits, BLOCK_D)
    t = split * split_length
    left = tl.minimum(split_length, L - t).to(tl.int32)
    states = tl.arange(0, N)[:, None]
    in_matrix, held_states = _in_states(row * 0, columns, held, d, n, one, N)
    A2 = scaled_for_exp2(load_number(A_ptr, in_matrix, held_states, COMPLEX))
    B = constant(0.0, (N, 1), COMPLEX)
    C = B
    if B_INVARIANT:
        B = load_number(B_ptr, in_matrix, held_states, COMPLEX)
    if C_INVARIANT:
        C = load_number(C_ptr, in_matrix, held_states, COMPLEX)
    D = load_parameter(D_ptr, columns, held)
    bias = load_parameter(bias_ptr, columns, held)

    x = constant(0.0, (N, BLOCK_D), COMPLEX)
    if leaving_ptr is not None:
        if split > 0:
            at, mask = _in_kept(row - 1, columns, held, d, n, one, N)
            x = load_number(leaving_ptr, at, mask, COMPLEX)
    if borders_ptr is None and initial_ptr is not None:
        if split == 0:
            at, mask = _in_states(batch, columns, held, d, n, one, N)
            x = load_number(initial_ptr, at, mask, COMPLEX)

    u_ptrs = u_ptr + batch * u_batch + t * u_step + columns * u_channel
    delta_ptrs = delta_ptr + batch * delta_batch + t * delta_step + columns * delta_channel
    out_ptrs = out_ptr + (batch * L + t) * d + columns
    u_way = tl.cast(u_step, tl.int64)
    delta_way = tl.cast(delta_step, tl.int64)
    z_ptrs = None
    z_way = u_way
    if z_ptr is not None:
        z_ptrs = z_ptr + batch * z_batch + t * z_step + columns * z_channel
        z_way = tl.cast(z_step, tl.int64)
    way = groups.to(tl.int64) * N * len(x)
    in_rows = ((batch * L + t) * groups + group) * N * len(x)
    B_ptr += in_rows
    C_ptr += in_rows
    kept = batch * tl.cdiv(L, CHUNK)

    next_u = load_rows(u_ptrs, u_way, left, held, RUN)
    next_delta = load_rows(delta_ptrs, delta_way, left, held, RUN)
    next_z = next_u
    if z_ptrs is not None:
        next_z = load_rows(z_ptrs, z_way, left, held, RUN)
    while left > 0:
        u_rows = next_u
        delta_rows = next_delta
        z_rows = next_z
        u_ptrs += RUN * u_way
        delta_ptrs += RUN * delta_way
        next_u = load_rows(u_ptrs, u_way, left - RUN, held, RUN)
        next_delta = load_rows(delta_ptrs, delta_way, left - RUN, held, RUN)
        if z_ptrs is None:
            next_z = next_u
        else:
            z_ptrs += RUN * z_way
            next_z = load_rows(z_ptrs, z_way, left - RUN, held, RUN)
        for r in tl.static_range(RUN):
            inside = r < left
            if borders_ptr is not None:
                sequence, begins, ends = border(tl.load(borders_ptr + t + r, mask=inside, other=0))
                if begins:
                    x = constant(0.0, (N, BLOCK_D), COMPLEX)
                    if initial_ptr is not None:
                        at, mask = _in_states(sequence, columns, held, d, n, one, N)
                        x = load_number(initial_ptr, at, mask, COMPLEX)
            if checkpoints_ptr is not None and r == 0:
                if t % CHUNK == 0:
                    at, mask = _in_kept(kept + t // CHUNK, columns, held, d, n, one, N)
                    store_number(checkpoints_ptr, at, x, mask)
            if not B_INVARIANT:
                B = load_number(B_ptr + r * way, states, inside, COMPLEX)
            if not C_INVARIANT:
                C = load_number(C_ptr + r * way, states, inside, COMPLEX)
            u = u_rows[r].to(tl.float32)
            dt = steps_of(delta_rows[r], bias, inside, SOFTPLUS)
            b = scale((dt * u)[None, :], B)
            x = multiply_add(decay(dt[None, :], A2), x, b)
            y = tl.sum(real_of_product(C, x), 0)
            if COMPLEX:
                y = 2.0 * y
            if D_ptr is not None:
                y += D * u
            if z_ptrs is not None:
                z = z_rows[r].to(tl.float32)
                y *= z * sigmoid(z)
            tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=held & inside)
            out_ptrs += d
            if borders_ptr is not None and final_ptr is not None:
                if ends:
                    sequence += hidden_zero(t)
                    at, mask = _in_states(sequence, columns, held, d, n, one, N)
                    store_number(final_ptr, at, x, mask)
        B_ptr += RUN * way
        C_ptr += RUN * way
        t += RUN
        left -= RUN
    if borders_ptr is None and final_ptr is not None:
        if split == splits - 1:
            at, mask = _in_states(batch + hidden_zero(t), columns, held, d, n, one, N)
            store_number(final_ptr, at, x, mask)
