"""selective_scan's kernels that find the state between splits of time, where there are several.

Each split does exp(A total dt) x + local to the state x that enters it. The first kernel finds
`local` and `total`, all splits at once; the second goes from split to split. In REVERSE this is the
gradient of the state: what reaches step t from later ones is K_t = conj(a_t) (c_t + K_{t+1}), with
c = [2] conj(C) grad_y.
"""

import triton
import triton.language as tl

from kexue_kernels.scan.triton_selective_maths import (
    decay,
    load_number,
    scale,
    scaled_for_exp2,
    sigmoid,
    store_number,
)
from kexue_kernels.scan.triton_selective_scan_kernel import (
    border,
    load_parameter,
    load_rows,
    place,
    steps_of,
)
from kexue_kernels.triton_common import (
    add,
    conjugate,
    constant,
    inline,
    multiply,
    multiply_add,
    select,
)


@inline
def _range(
    borders_ptr, cu_seqlens_ptr, batch, split, splits, split_length, L, REVERSE: tl.constexpr
):
    """The steps of a split whose state leaves it: first, end, whose sequence they are, and whether
    it began in an earlier split (REVERSE: ends in a later one)."""
    start = split * split_length
    end = tl.minimum(start + split_length, L)
    sequence = batch
    continues = split < splits - 1 if REVERSE else split > 0
    if borders_ptr is not None:
        sequence, _, _ = border(tl.load(borders_ptr + (start if REVERSE else end - 1)))
        if REVERSE:
            bound = tl.load(cu_seqlens_ptr + sequence + 1)
            continues = bound > end
            end = tl.minimum(end, bound)
        else:
            bound = tl.load(cu_seqlens_ptr + sequence)
            continues = bound < start
            start = tl.maximum(start, bound)
    return start, end, sequence, continues


@triton.jit(
    do_not_specialize=["L", "d", "n", "groups", "splits", "split_length", "one"],
)
def split_kernel(
    value_ptr, delta_ptr, A_ptr, M_ptr, z_ptr, bias_ptr, first_ptr,
    borders_ptr, cu_seqlens_ptr, local_ptr, total_ptr,
    L, d, n, groups, splits, split_length, one,
    value_batch, value_step, value_channel, delta_batch, delta_step, delta_channel,
    z_batch, z_step, z_channel,
    SOFTPLUS: tl.constexpr, COMPLEX: tl.constexpr, INVARIANT: tl.constexpr,
    REVERSE: tl.constexpr, RUN: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """local [batch, splits, n, d] and total [batch, splits, d], which is infinite where the split
    forgets what entered it. `value` is u, M is B and first is the initial state; in REVERSE they
    are grad_out (whose gate is z), C and grad_final. Otherwise as selective_scan_kernel."""
    row, batch, split, _, group, columns, held = place(d, groups, splits, BLOCK_D)
    start, end, sequence, continues = _range(
        borders_ptr, cu_seqlens_ptr, batch, split, splits, split_length, L, REVERSE
    )
    left = (end - start).to(tl.int32)
    if split == (0 if REVERSE else splits - 1):  # nothing comes after
        left = left * 0
    states = tl.arange(0, N)[:, None]
    held_states = (states < n) & held[None, :]
    in_state = columns[None, :] * n + states * one  # of [d, n]
    A2 = scaled_for_exp2(load_number(A_ptr, in_state, held_states, COMPLEX))
    M = constant(0.0, (N, 1), COMPLEX)
    if INVARIANT:
        M = load_number(M_ptr, in_state, held_states, COMPLEX)
    bias = load_parameter(bias_ptr, columns, held)
    x = constant(0.0, (N, BLOCK_D), COMPLEX)
    if first_ptr is not None:
        if not continues:
            first = sequence * d * n * len(x)
            x = load_number(first_ptr + first, in_state, held_states, COMPLEX)
    total = tl.zeros((BLOCK_D,), tl.float32)

    WAY: tl.constexpr = -1 if REVERSE else 1
    t = end - 1 if REVERSE else start
    ptrs = value_ptr + batch * value_batch + t * value_step + columns * value_channel
    delta_ptrs = delta_ptr + batch * delta_batch + t * delta_step + columns * delta_channel
    way = WAY * tl.cast(value_step, tl.int64)
    delta_way = WAY * tl.cast(delta_step, tl.int64)
    z_ptrs = None
    z_way = way
    if z_ptr is not None:
        z_ptrs = z_ptr + batch * z_batch + t * z_step + columns * z_channel
        z_way = WAY * tl.cast(z_step, tl.int64)
    M_ptr += ((batch * L + t) * groups + group) * N * len(x)
    M_way = WAY * groups.to(tl.int64) * N * len(x)
    next_values = load_rows(ptrs, way, left, held, RUN)
    next_delta = load_rows(delta_ptrs, delta_way, left, held, RUN)
    while left > 0:
        values = next_values
        delta = next_delta
        ptrs += RUN * way
        delta_ptrs += RUN * delta_way
        next_values = load_rows(ptrs, way, left - RUN, held, RUN)
        next_delta = load_rows(delta_ptrs, delta_way, left - RUN, held, RUN)
        for r in tl.static_range(RUN):
            inside = r < left
            if not INVARIANT:
                M = load_number(M_ptr + r * M_way, states, inside, COMPLEX)
            dt = steps_of(delta[r], bias, inside, SOFTPLUS)
            total += dt
            value = values[r].to(tl.float32)
            if REVERSE:
                if z_ptrs is not None:
                    z = tl.load(z_ptrs, mask=held & inside, other=0.0).to(tl.float32)
                    value *= z * sigmoid(z)
                    z_ptrs += z_way
                if COMPLEX:
                    value *= 2.0
                c = scale(value[None, :], conjugate(M))
                x = multiply(conjugate(decay(dt[None, :], A2)), add(c, x))
            else:
                x = multiply_add(decay(dt[None, :], A2), x, scale((dt * value)[None, :], M))
        M_ptr += RUN * M_way
        left -= RUN
    total = tl.where(continues, total, float("inf"))
    tl.store(total_ptr + row * d + columns, total, mask=held)
    offsets = states.to(tl.int64) * d + columns[None, :] * one
    store_number(local_ptr + row * n * d * len(x), offsets, x, held_states)


@triton.jit(do_not_specialize=["d", "n", "splits"])
def join_kernel(
    A_ptr, state_ptr, total_ptr, d, n, splits,
    COMPLEX: tl.constexpr, REVERSE: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """state [batch, splits, n, d] holds what split_kernel made of each split, and in the end the
    state after each (REVERSE: before)."""
    size = n.to(tl.int64) * d
    blocks = tl.cdiv(size, BLOCK)
    batch = tl.program_id(0) // blocks
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    held = at < size
    columns = at % d
    A2 = scaled_for_exp2(load_number(A_ptr, columns * n + at // d, held, COMPLEX))
    first = splits - 1 if REVERSE else 0
    row = batch * splits + first
    WAY: tl.constexpr = -1 if REVERSE else 1
    PARTS: tl.constexpr = 2 if COMPLEX else 1
    state = constant(0.0, (BLOCK,), COMPLEX)
    left = splits
    while left > 0:
        totals = ()
        locals_ = ()
        for r in tl.static_range(RUN):
            mask = held & (r < left)
            rows = row + r * WAY
            totals = totals + (tl.load(total_ptr + rows * d + columns, mask=mask, other=0.0),)
            ptr = state_ptr + rows * size * PARTS
            locals_ = locals_ + (load_number(ptr, at, mask, COMPLEX),)
        for r in tl.static_range(RUN):
            forgets = totals[r] == float("inf")
            a = decay(tl.where(forgets, 0.0, totals[r]), A2)
            if REVERSE:
                a = conjugate(a)
            state = select(forgets, locals_[r], multiply_add(a, state, locals_[r]))
            ptr = state_ptr + (row + r * WAY) * size * PARTS
            store_number(ptr, at, state, held & (r < left))
        row += RUN * WAY
        left -= RUN
