"""linear_scan's kernel, forward and backward: x_s = c_s x_{s-1} + b_s along the way of travel.

    forward    c = a                               b = b         x = h
    backward   c = conj(a of the step before) or 1  b = grad_h    x = grad_b, the other way round

A program owns BLOCK_D channels of a sequence, tile after tile of RUNS * RUN steps, or CHAINED
one such tile, a chunk of the sequence. Each thread owns a run of RUN steps and a few channels
and walks it twice: for what the run does to the state that enters it, an affine map, and, once
the scan over all runs before has given that state, for x. What was read stays in registers
between the two, so each array crosses the memory bus once.

s counts steps in the direction of travel, from the sequence's own start.
"""

import triton
import triton.language as tl

from kexue_kernels.scan.triton_chained_scan import (
    apply,
    column_sums,
    enter_chunk,
    find_sequence,
    last_row,
    rows_before,
    scan_runs,
    take_ticket,
)
from kexue_kernels.triton_common import (
    add,
    conjugate,
    constant,
    inline,
    multiply,
    multiply_add,
    pack,
    select,
    unpack,
)


@inline
def _place(
    cu_seqlens_ptr, chain_ptr, L, D, sequences,
    CHAINED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """This program's sequence, its offset in L and length, the sequence's first row among all
    chunks, the program's first chunk, and its block of channels."""
    blocks = tl.cdiv(D, BLOCK_D)
    ticket = take_ticket(chain_ptr) if CHAINED else tl.program_id(0)
    row = ticket // blocks
    if cu_seqlens_ptr is not None:
        sequence = row
        if CHAINED:
            sequence = find_sequence(cu_seqlens_ptr, sequences, row, BLOCK_L)
        start = tl.load(cu_seqlens_ptr + sequence)
        length = tl.load(cu_seqlens_ptr + sequence + 1) - start
        first_row = (start // BLOCK_L).to(tl.int32) + sequence
        chunk = row - first_row
    else:  # first chunks of all sequences, then second ones
        sequence = row % sequences
        start = tl.cast(0, tl.int64)
        length = start + L
        first_row = sequence * tl.cdiv(length, BLOCK_L).to(tl.int32)
        chunk = row // sequences
    if not CHAINED:
        chunk = row * 0
    return sequence, start, length, first_row, chunk, ticket % blocks


@inline
def _columns(block, D, BLOCK_D: tl.constexpr):
    """Channels [1, BLOCK_D], and which of them exist."""
    columns = block.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    return columns, columns < D


@inline
def _hidden_zero(length):
    """0, but the compiler can't know. It would find that numbers or addresses were there before,
    and keep them in registers that the tile needs, where computing them anew is next to free."""
    return length >> 62


@inline
def _load_runs(ptrs, way, s, begin, end, held, other, RUN: tl.constexpr):
    """Steps s, …, s + RUN - 1 from `ptrs` [RUNS, BLOCK_D], a tensor for each; `other` outside
    of begin <= step < end."""
    steps = ()
    for r in tl.static_range(RUN):
        inside = (s + r >= begin) & (s + r < end) & held
        steps = steps + (tl.load(ptrs, mask=inside, other=other),)
        ptrs += way
    return steps


@inline
def _again(x, zero, HALF: tl.constexpr):
    """`unpack` once more, not remembered: an unpacked half takes twice the room."""
    if HALF is not None:
        x = x ^ zero.to(tl.int32)
    return unpack(x, HALF)


@inline
def _coefficient(a_steps, r, a_all, inside, zero, BACKWARD: tl.constexpr, HALF: tl.constexpr):
    """c of each run's step r; 1 where it is not `inside`."""
    if len(a_steps) == 0:
        c = select(inside, a_all, constant(1.0, (1, 1), len(a_all) == 2))
    else:
        c = _again(a_steps[r], zero, HALF)
    if BACKWARD:
        c = conjugate(c)
    return c


@inline
def _tile(
    a_ptrs, b_ptrs, x_ptrs, h_ptrs, grad_a_ptrs, a_way, b_way, x_way, h_way,
    s, length, held, words_held, state, a_all, total, chain,
    BACKWARD: tl.constexpr, HALF: tl.constexpr, ONE: tl.constexpr,
    WINDOW: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile, its steps s [RUNS, 1] from the state [1, BLOCK_D] that enters the tile, or, with
    a chain, its own. Returns the state that leaves, and `total` plus the tile's grad_a."""
    COMPLEX: tl.constexpr = len(total) == 2
    behind: tl.constexpr = 1 if BACKWARD else 0
    zero = _hidden_zero(length)
    apart = zero * 16  # added to what an address moves by, known to keep it aligned
    b_steps = _load_runs(b_ptrs + s * b_way, b_way + apart, s, 0, length, words_held, 0, RUN)
    a_steps = ()
    if a_ptrs is not None:
        a_ptrs += (s - behind) * a_way
        a_steps = _load_runs(a_ptrs, a_way + apart, s, behind, length, words_held, ONE, RUN)
    h_steps = ()
    if h_ptrs is not None:
        h_ptrs += (s + 1) * h_way
        if HALF is None:
            h_steps = _load_runs(h_ptrs, h_way + apart, s, 0, length - 1, words_held, 0, RUN)

    a_run = constant(1.0, (RUNS, BLOCK_D), COMPLEX)
    b_run = constant(0.0, (RUNS, BLOCK_D), COMPLEX)
    for r in tl.static_range(RUN):
        inside = (s + r >= behind) & (s + r < length)
        c = _coefficient(a_steps, r, a_all, inside, zero * 0, BACKWARD, HALF)
        b_run = multiply_add(c, b_run, unpack(b_steps[r], HALF))
        a_run = multiply(c, a_run)
    a_run, b_run = scan_runs(a_run, b_run)
    if chain is not None:
        a_chunk = last_row(a_run, RUNS, BLOCK_D)
        b_chunk = last_row(b_run, RUNS, BLOCK_D)
        state = enter_chunk(*chain, a_chunk, b_chunk, WINDOW, BLOCK_D)
    if h_ptrs is not None:
        if HALF is not None:  # not before the wait for the chain: halves crowd the registers
            h_steps = _load_runs(h_ptrs, h_way + apart, s, 0, length - 1, words_held, 0, RUN)

    x = rows_before(apply(a_run, b_run, state), state, RUNS, BLOCK_D)
    begin = tl.where(s < behind, 1, 0)
    left = tl.minimum(tl.maximum(length - s, 0), RUN + 1).to(tl.int32)
    x_ptrs += s * x_way
    if grad_a_ptrs is not None:
        grad_a_ptrs += s * x_way
    for r in tl.static_range(RUN):
        c = _coefficient(a_steps, r, a_all, (r >= begin) & (r < left), zero, BACKWARD, HALF)
        x = multiply_add(c, x, _again(b_steps[r], zero, HALF))
        tl.store(x_ptrs, pack(x, x_ptrs.dtype.element_ty), mask=(r < left) & held)
        x_ptrs += x_way + apart
        if h_ptrs is not None:
            grad_a = multiply(x, conjugate(_again(h_steps[r], zero, HALF)))
            if grad_a_ptrs is None:
                total = add(total, select(r + 1 < left, grad_a, constant(0.0, (1, 1), COMPLEX)))
            else:
                grad_a = pack(grad_a, grad_a_ptrs.dtype.element_ty)
                tl.store(grad_a_ptrs, grad_a, mask=(r + 1 < left) & held)
                grad_a_ptrs += x_way + apart
    return last_row(x, RUNS, BLOCK_D), total


@inline
def _finish(
    a_ptrs, last_ptrs, initial_ptrs, grad_a_ptrs, length, held, words_held, state, a_all, total,
    BACKWARD: tl.constexpr, HALF: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """What becomes of the state that leaves the last step: it is the final state or gives
    grad_initial, and the last grad_a. Pointers are to that step's. Returns `total` with it."""
    COMPLEX: tl.constexpr = len(state) == 2
    if last_ptrs is not None:
        last = state
        if BACKWARD:
            a = a_all
            if a_ptrs is not None:
                step = tl.load(a_ptrs, mask=words_held & (length > 0), other=ONE)
                a = unpack(step, HALF)
            last = select(length > 0, multiply(conjugate(a), state), state)
        tl.store(last_ptrs, pack(last, tl.float32), mask=held)
    stepped = held & (length > 0)
    grad_a = constant(0.0, (1, held.shape[1]), COMPLEX)
    if initial_ptrs is not None:
        h = unpack(tl.load(initial_ptrs, mask=stepped, other=0), None)
        grad_a = multiply(state, conjugate(h))
    if grad_a_ptrs is not None:
        tl.store(grad_a_ptrs, pack(grad_a, grad_a_ptrs.dtype.element_ty), mask=stepped)
    return add(total, grad_a)


@triton.jit(do_not_specialize=["L", "sequences", "rows"])
def linear_scan_kernel(
    a_ptr, b_ptr, x_ptr, first_ptr, last_ptr, h_ptr, initial_ptr, grad_a_ptr,
    cu_seqlens_ptr, chain_ptr, L, D, sequences, rows,
    a_batch, a_step, a_channel, b_batch, b_step, b_channel, h_batch, h_step, h_channel,
    BACKWARD: tl.constexpr, INVARIANT: tl.constexpr, REVERSE: tl.constexpr,
    HALF: tl.constexpr, ONE: tl.constexpr, WINDOW: tl.constexpr,
    RUN: tl.constexpr, RUNS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x [B, L, D], and with h grad_a, from a, b and h by strides; the others are contiguous.

    first is the state that enters [sequences, D], last the state that leaves (backward: the
    gradient of the one that entered), either None. grad_a is [B, L, D], or if a is INVARIANT
    sums over each sequence, if chained over each chunk. With HALF, b, h and a (unless INVARIANT)
    are int32 words of two HALFs. A chain_ptr chains programs of one chunk each.
    """
    BLOCK_L: tl.constexpr = RUN * RUNS
    CHAINED: tl.constexpr = chain_ptr is not None
    COMPLEX: tl.constexpr = x_ptr.dtype.element_ty == tl.int64
    PER_WORD: tl.constexpr = 1 if HALF is None else 2
    WAY: tl.constexpr = -1 if REVERSE else 1
    sequence, start, length, first_row, chunk, block = _place(
        cu_seqlens_ptr, chain_ptr, L, D, sequences, CHAINED, BLOCK_L, BLOCK_D
    )
    columns, held = _columns(block, D, BLOCK_D)
    words, words_held = _columns(block, D // PER_WORD, BLOCK_D // PER_WORD)
    batch = sequence.to(tl.int64)
    states = batch * D + columns
    if cu_seqlens_ptr is not None:
        batch = batch * 0
    ahead = length - 1
    if REVERSE:
        start += ahead
    a_way = WAY * tl.cast(a_step, tl.int64)
    b_way = WAY * tl.cast(b_step, tl.int64)
    x_way = WAY * tl.cast(D, tl.int64)
    h_way = WAY * tl.cast(h_step, tl.int64)
    b_ptrs = b_ptr + batch * b_batch + start * b_step + words * b_channel
    x_offsets = (batch * L + start) * D + columns
    x_ptrs = x_ptr + x_offsets
    if INVARIANT:
        a_ptrs = None
        a_all = tl.load(a_ptr + batch * a_batch + columns * a_channel, mask=held, other=0)
        a_all = unpack(a_all, None)
    else:
        a_ptrs = a_ptr + batch * a_batch + start * a_step + words * a_channel
        a_all = constant(1.0, (1, 1), COMPLEX)
    h_ptrs = None
    grad_a_ptrs = None
    total = constant(0.0, (1, BLOCK_D), COMPLEX)
    if h_ptr is not None:
        h_ptrs = h_ptr + batch * h_batch + start * h_step + words * h_channel
        if INVARIANT:
            total = constant(0.0, (RUNS, BLOCK_D), COMPLEX)
        else:
            grad_a_ptrs = grad_a_ptr + x_offsets
    first_ptrs = None if first_ptr is None else first_ptr + states

    chunks = tl.maximum(tl.cdiv(length, BLOCK_L), 1).to(tl.int32)
    working = chunk < chunks
    state = constant(0.0, (1, BLOCK_D), COMPLEX)
    if CHAINED:
        sums_row = first_row + chunk
        if working:
            s = chunk.to(tl.int64) * BLOCK_L + RUN * tl.arange(0, RUNS)[:, None]
            chain = (chain_ptr, first_row, rows, chunk, chunks, first_ptrs, columns, D)
            state, total = _tile(
                a_ptrs, b_ptrs, x_ptrs, h_ptrs, grad_a_ptrs, a_way, b_way, x_way, h_way,
                s, length, held, words_held, state, a_all, total, chain,
                BACKWARD, HALF, ONE, WINDOW, RUN, RUNS, BLOCK_D,
            )  # fmt: skip
        chunk += 1
    else:
        sums_row = sequence
        if first_ptrs is not None:
            state = unpack(tl.load(first_ptrs, mask=held, other=0), None)
        while chunk < chunks:
            number = chunk ^ _hidden_zero(length)  # or dozens of pointers go round the loop
            s = number * BLOCK_L + RUN * tl.arange(0, RUNS)[:, None]
            state, total = _tile(
                a_ptrs, b_ptrs, x_ptrs, h_ptrs, grad_a_ptrs, a_way, b_way, x_way, h_way,
                s, length, held, words_held, state, a_all, total, None,
                BACKWARD, HALF, ONE, WINDOW, RUN, RUNS, BLOCK_D,
            )  # fmt: skip
            chunk += 1

    total = column_sums(total)
    if working & (chunk == chunks):
        total = _finish(
            None if INVARIANT else a_ptrs + ahead * a_way,
            None if last_ptr is None else last_ptr + states,
            None if initial_ptr is None else initial_ptr + states,
            None if grad_a_ptrs is None else grad_a_ptrs + ahead * x_way,
            length, held, words_held, state, a_all, total, BACKWARD, HALF, ONE,
        )  # fmt: skip
    if h_ptr is not None:
        if INVARIANT:
            sums = sums_row.to(tl.int64) * D + columns
            tl.store(grad_a_ptr + sums, pack(total, tl.float32), mask=held & working)
