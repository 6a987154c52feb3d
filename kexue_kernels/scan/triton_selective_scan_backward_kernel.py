"""selective_scan's backward kernel.

A program owns BLOCK_D channels of a split of one batch row's steps, and takes its chunks from the
last to the first. A chunk is a tile of RUNS runs of RUN steps: each thread owns a run and a few
channels. One after the other, each of the n states goes through the tile twice: forward from the
checkpoint for the states x, and backward for their gradients G, both as scans over runs.

With a_t = exp(dt_t A), b_t = dt_t B_t u_t and c_t = [2] conj(C_t) g_t, where g_t = grad_out_t
silu(z_t) is the gradient of y_t,

    x_t = a_t x_{t-1} + b_t        G_t = c_t + K_{t+1}        K_t = conj(a_t) G_t

and K, what reaches the steps before, is carried from chunk to chunk in memory.
"""

import triton
import triton.language as tl

from kexue_kernels.scan.triton_chained_scan import apply, column_sums, rows_before, scan_runs
from kexue_kernels.scan.triton_selective_maths import (
    decay,
    load_number,
    real_of_product,
    scale,
    scale_add,
    scaled_for_exp2,
    sigmoid,
    store_number,
)
from kexue_kernels.scan.triton_selective_scan_kernel import (
    border,
    hidden_zero,
    load_parameter,
    place,
    steps_of,
)
from kexue_kernels.scan.triton_selective_tiles import rows_after, scan_runs_back, store_sums
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
def _first_steps(ptr, batch, t, s, columns, batch_stride, step, channel):
    """Pointers [RUNS, BLOCK_D] to each run's first step, and from step to step."""
    way = tl.cast(step, tl.int64)
    return ptr + (batch * batch_stride + t * way) + s * way + columns * channel, way


@inline
def _load(ptrs, mask):
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@inline
def _load_matrix(
    ptr, in_rows, way, in_state, s, left, held, COMPLEX: tl.constexpr, INVARIANT: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    """A state's B or C for each step, [RUNS, 1], or INVARIANT [1, BLOCK_D]."""
    steps = ()
    if INVARIANT:
        x = load_number(ptr, in_state, held, COMPLEX)
        for _ in tl.static_range(RUN):
            steps = steps + (x,)
    else:
        for r in tl.static_range(RUN):
            steps = steps + (load_number(ptr, in_rows + r * way, s + r < left, COMPLEX),)
    return steps


@inline
def _load_borders(borders_ptr, t, s, left, RUN: tl.constexpr):
    """What there is for each step [RUNS, 1]; nothing without packed sequences."""
    steps = ()
    if borders_ptr is not None:
        for r in tl.static_range(RUN):
            steps = steps + (tl.load(borders_ptr + t + s + r, mask=s + r < left, other=0),)
    return steps


@inline
def _cut(x, here, ptr, offsets, held, COMPLEX: tl.constexpr):
    """x, but what memory has (zero without) where a sequence begins or ends here."""
    if ptr is None:
        return select(here, constant(0.0, (1, 1), COMPLEX), x)
    else:
        return select(here, load_number(ptr, offsets, here & held, COMPLEX), x)


@inline
def _accumulate(ptr, offsets, x, held):
    """Adds x to what this program has alone."""
    store_number(ptr, offsets, add(load_number(ptr, offsets, held, len(x) == 2), x), held)


@inline
def _one_state(
    A, Bs, Cs, state, K, dts, dtus, gs, qs, ps, ys,
    borders, initial_ptr, grad_final_ptr, grad_initial_ptr, columns, d, n, i,
    s, left, held, grad_B_ptr, grad_C_ptr,
    RUN: tl.constexpr, RUNS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """State i of each channel through the tile, from `state` that enters it and K that reaches its
    last step. Returns K that leaves each run, grad_A, sums over steps of grad_B and grad_C if
    these are time-invariant, and updated sums over states: qs of Re(conj(B) G), ps of
    Re(conj(A a_t x_{t-1}) G) and ys."""
    COMPLEX: tl.constexpr = len(A) == 2
    A2 = scaled_for_exp2(A)
    decays = ()
    a_run = constant(1.0, (RUNS, BLOCK_D), COMPLEX)
    b_run = constant(0.0, (RUNS, BLOCK_D), COMPLEX)
    for r in tl.static_range(RUN):
        a = decay(dts[r], A2)
        decays = decays + (a,)
        if len(borders) > 0:
            own, begins, _ = border(borders[r])
            in_state = (own * d + columns) * n + i
            b_run = _cut(b_run, begins, initial_ptr, in_state, held, COMPLEX)
            a_run = select(begins, constant(0.0, (1, 1), COMPLEX), a_run)
        b_run = multiply_add(a, b_run, scale(dtus[r], Bs[r]))
        a_run = multiply(a, a_run)
    a_before, b_before = scan_runs(a_run, b_run)
    x = rows_before(apply(a_before, b_before, state), state, RUNS, BLOCK_D)

    a_run = constant(1.0, (RUNS, BLOCK_D), COMPLEX)
    b_run = constant(0.0, (RUNS, BLOCK_D), COMPLEX)
    for r in tl.static_range(RUN - 1, -1, -1):
        a = conjugate(decays[r])
        if len(borders) > 0:
            own, _, ends = border(borders[r])
            in_state = (own * d + columns) * n + i
            b_run = _cut(b_run, ends, grad_final_ptr, in_state, held, COMPLEX)
            a_run = select(ends, constant(0.0, (1, 1), COMPLEX), a_run)
        b_run = multiply(a, scale_add(gs[r], conjugate(Cs[r]), b_run))
        a_run = multiply(a, a_run)
    a_after, b_after = scan_runs_back(a_run, b_run)
    Ks = apply(a_after, b_after, K)
    K = rows_after(Ks, K, RUNS, BLOCK_D)

    kept = ()  # a_t x_{t-1}
    grad_C = constant(0.0, (RUNS, BLOCK_D), COMPLEX)
    grad_Cs = ()
    new_ys = ()
    for r in tl.static_range(RUN):
        if len(borders) > 0:
            own, begins, _ = border(borders[r])
            in_state = (own * d + columns) * n + i
            x = _cut(x, begins, initial_ptr, in_state, held, COMPLEX)
        ax = multiply(decays[r], x)
        x = scale_add(dtus[r], Bs[r], ax)
        kept = kept + (ax,)
        if len(ys) > 0:
            new_ys = new_ys + (ys[r] + real_of_product(Cs[r], x),)
        of_step = scale(gs[r], conjugate(x))
        if grad_C_ptr is None:
            grad_C = add(grad_C, of_step)
        else:
            grad_Cs = grad_Cs + (of_step,)
    if grad_C_ptr is not None:
        store_sums(grad_C_ptr, grad_Cs, s, left, RUN)

    grad_A = constant(0.0, (RUNS, BLOCK_D), COMPLEX)
    grad_B = constant(0.0, (RUNS, BLOCK_D), COMPLEX)
    grad_Bs = ()
    new_qs = ()
    new_ps = ()
    for r in tl.static_range(RUN - 1, -1, -1):
        if len(borders) > 0:
            own, begins, ends = border(borders[r])
            in_state = (own * d + columns) * n + i
            K = _cut(K, ends, grad_final_ptr, in_state, held, COMPLEX)
        G = scale_add(gs[r], conjugate(Cs[r]), K)
        K = multiply(conjugate(decays[r]), G)
        if len(borders) > 0 and grad_initial_ptr is not None:
            store_number(grad_initial_ptr, in_state, K, begins & held)
        of_step = scale(dtus[r], G)
        if grad_B_ptr is None:
            grad_B = add(grad_B, of_step)
        else:
            grad_Bs = (of_step,) + grad_Bs
        product = multiply(conjugate(kept[r]), G)
        grad_A = scale_add(dts[r], product, grad_A)
        new_qs = (qs[r] + real_of_product(conjugate(Bs[r]), G),) + new_qs
        new_ps = (ps[r] + real_of_product(conjugate(A), product),) + new_ps
    if grad_B_ptr is not None:
        store_sums(grad_B_ptr, grad_Bs, s, left, RUN)
    sums = (column_sums(grad_A), column_sums(grad_B), column_sums(grad_C))
    return Ks, sums, new_qs, new_ps, new_ys


@triton.jit(do_not_specialize=["L", "n", "groups", "splits", "split_length"])
def selective_scan_backward_kernel(
    grad_out_ptr, u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr,
    initial_ptr, grad_final_ptr, borders_ptr, checkpoints_ptr, K_ptr,
    grad_u_ptr, grad_delta_ptr, grad_A_ptr, grad_B_ptr, grad_C_ptr, grad_D_ptr, grad_z_ptr,
    grad_bias_ptr, grad_initial_ptr,
    L, d, n, groups, splits, split_length,
    grad_out_batch, grad_out_step, grad_out_channel, u_batch, u_step, u_channel,
    delta_batch, delta_step, delta_channel, z_batch, z_step, z_channel,
    SOFTPLUS: tl.constexpr, COMPLEX: tl.constexpr,
    B_INVARIANT: tl.constexpr, C_INVARIANT: tl.constexpr, CHUNK: tl.constexpr,
    RUN: tl.constexpr, RUNS: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """grad_u, grad_delta and grad_z [batch, L, d], and partial sums for the rest.

    grad_out, u, delta and z by strides; B and C [batch, L, groups, N], or INVARIANT like A: all
    time-invariant matrices are [n, d] here. K [batch, splits, n, d] holds what reaches the end of
    each split, and in the end what leaves its beginning. grad_D and grad_bias [batch, splits, d],
    grad_A, and grad_B and grad_C where INVARIANT, [batch, splits, n, d] are zero at first;
    otherwise grad_B and grad_C are [batch, blocks of channels, n, L].

    Packed sequences alone use initial, grad_final and grad_initial [S, d, n], where each begins
    and ends.
    """
    row, batch, split, block, group, columns, held = place(d, groups, splits, BLOCK_D, VECTOR)
    PARTS: tl.constexpr = 2 if COMPLEX else 1
    columns = columns[None, :]
    held = held[None, :]
    blocks = tl.cdiv(d // groups, BLOCK_D) * groups
    start = split * split_length
    end = tl.minimum(start + split_length, L)
    chunk = (end - 1) // CHUNK
    first = start // CHUNK
    s = RUN * tl.arange(0, RUNS)[:, None]
    way = groups.to(tl.int64) * N
    while chunk >= first:
        t = chunk * CHUNK
        left = tl.minimum(end - t, CHUNK).to(tl.int32)
        dts = ()
        dtus = ()
        gs = ()
        qs = ()
        ps = ()
        ys = ()
        zero = tl.zeros((RUNS, BLOCK_D), tl.float32)
        zero_t = hidden_zero(t)
        runs = s + zero_t
        channels = columns + zero_t
        bias = load_parameter(bias_ptr, channels, held)
        u_ptrs, u_way = _first_steps(u_ptr, batch, t, runs, channels, u_batch, u_step, u_channel)
        delta_ptrs, delta_way = _first_steps(
            delta_ptr, batch, t, runs, channels, delta_batch, delta_step, delta_channel
        )
        g_ptrs, g_way = _first_steps(
            grad_out_ptr, batch, t, runs, channels, grad_out_batch, grad_out_step, grad_out_channel
        )
        if z_ptr is not None:
            z_ptrs, z_way = _first_steps(
                z_ptr, batch, t, runs, channels, z_batch, z_step, z_channel
            )
        for r in tl.static_range(RUN):
            mask = (runs + r < left) & held
            u = _load(u_ptrs + r * u_way, mask)
            delta = _load(delta_ptrs + r * delta_way, mask)
            g = _load(g_ptrs + r * g_way, mask)
            if z_ptr is not None:
                z = _load(z_ptrs + r * z_way, mask)
                g *= z * sigmoid(z)
                ys = ys + (zero,)
            if COMPLEX:
                g *= 2.0
            dt = steps_of(delta, bias, s + r < left, SOFTPLUS)
            dts = dts + (dt,)
            dtus = dtus + (dt * u,)
            gs = gs + (g,)
            qs = qs + (zero,)
            ps = ps + (zero,)
        borders = _load_borders(borders_ptr, t, s, left, RUN)
        in_rows = ((batch * L + t + s) * groups + group) * N
        in_kept = (batch * tl.cdiv(L, CHUNK) + chunk) * n * d + columns
        in_split = row * n * d + columns
        in_sums = (batch * blocks + block) * n * L + t
        i = n * 0
        while i < n:
            of_n = i * tl.cast(d, tl.int64)
            A = load_number(A_ptr, columns + of_n, held, COMPLEX)
            Bs = _load_matrix(
                B_ptr, in_rows + i, way, columns + of_n, s, left, held, COMPLEX, B_INVARIANT, RUN
            )
            Cs = _load_matrix(
                C_ptr, in_rows + i, way, columns + of_n, s, left, held, COMPLEX, C_INVARIANT, RUN
            )
            state = load_number(checkpoints_ptr, in_kept + of_n, held, COMPLEX)
            K = load_number(K_ptr, in_split + of_n, held, COMPLEX)
            sums_ptr = in_sums + i * tl.cast(L, tl.int64)
            Ks, sums, qs, ps, ys = _one_state(
                A, Bs, Cs, state, K, dts, dtus, gs, qs, ps, ys,
                borders, initial_ptr, grad_final_ptr, grad_initial_ptr, columns, d, n, i,
                s, left, held,
                None if B_INVARIANT else grad_B_ptr + sums_ptr * PARTS,
                None if C_INVARIANT else grad_C_ptr + sums_ptr * PARTS,
                RUN, RUNS, BLOCK_D,
            )  # fmt: skip
            store_number(K_ptr, in_split + of_n + s * 0, Ks, held & (s == 0))
            _accumulate(grad_A_ptr, in_split + of_n, sums[0], held)
            if B_INVARIANT:
                _accumulate(grad_B_ptr, in_split + of_n, sums[1], held)
            if C_INVARIANT:
                _accumulate(grad_C_ptr, in_split + of_n, sums[2], held)
            i += 1

        # what follows is read again: kept, it would crowd the registers
        t += zero_t
        zero_t = hidden_zero(t)
        runs = s + zero_t
        channels = columns + zero_t
        D = load_parameter(D_ptr, channels, held)
        bias = load_parameter(bias_ptr, channels, held)
        u_ptrs, u_way = _first_steps(u_ptr, batch, t, runs, channels, u_batch, u_step, u_channel)
        delta_ptrs, delta_way = _first_steps(
            delta_ptr, batch, t, runs, channels, delta_batch, delta_step, delta_channel
        )
        g_ptrs, g_way = _first_steps(
            grad_out_ptr, batch, t, runs, channels, grad_out_batch, grad_out_step, grad_out_channel
        )
        if z_ptr is not None:
            z_ptrs, z_way = _first_steps(
                z_ptr, batch, t, runs, channels, z_batch, z_step, z_channel
            )
        in_out = (batch * L + t) * d + runs * tl.cast(d, tl.int64) + channels
        grad_D = tl.zeros((RUNS, BLOCK_D), tl.float32)
        grad_bias = tl.zeros((RUNS, BLOCK_D), tl.float32)
        for r in tl.static_range(RUN):
            mask = (runs + r < left) & held
            u = _load(u_ptrs + r * u_way, mask)
            g = gs[r]
            if COMPLEX:
                g *= 0.5
            grad_D += g * u
            grad_u = D * g + dts[r] * qs[r]
            tl.store(grad_u_ptr + in_out, grad_u.to(u_ptr.dtype.element_ty), mask=mask)
            grad_dt = ps[r] + u * qs[r]
            if SOFTPLUS:
                delta = _load(delta_ptrs + r * delta_way, mask)
                grad_dt *= sigmoid(delta + bias)
            grad_bias += tl.where(mask, grad_dt, 0.0)
            tl.store(grad_delta_ptr + in_out, grad_dt.to(u_ptr.dtype.element_ty), mask=mask)
            if z_ptr is not None:
                z = _load(z_ptrs + r * z_way, mask)
                grad_out = _load(g_ptrs + r * g_way, mask)
                y = ys[r]
                if COMPLEX:
                    y *= 2.0
                gate = sigmoid(z)
                grad_z = grad_out * (y + D * u) * gate * (1.0 + z * (1.0 - gate))
                tl.store(grad_z_ptr + in_out, grad_z.to(u_ptr.dtype.element_ty), mask=mask)
            in_out += d
        if grad_D_ptr is not None:
            _accumulate(grad_D_ptr, row * d + columns, column_sums((grad_D,)), held)
        if grad_bias_ptr is not None:
            _accumulate(grad_bias_ptr, row * d + columns, column_sums((grad_bias,)), held)
        tl.debug_barrier()  # K and the sums in memory were another thread's
        chunk -= 1
