"""Scans along time that many programs share: runs of steps as affine maps, and their chain.

A run of steps does h -> a h + b to the state that enters it. The programs of one chain (one
sequence, one block of channels) each own a chunk of time, publish what it does, and find the
state that enters it in what the chunks before it published: Merrill and Garland, "Single-pass
Parallel Prefix Scan with Decoupled Look-back" (2016), except that neither what is read nor the
order in which it is combined depends on timing, so results are bitwise reproducible.

WINDOW chunks are a group, WINDOW groups a span. Three things are published: what each chunk
does, what each group does, and the state that enters each span. A chunk waits for the state
that enters its span, the groups of the span before its own and the chunks of the group before
itself, all in one read: a round trip to L2, or two for a group's last chunk, whatever the length.

Each (a, b) is one int64 word per channel (two where complex) that goes once from EMPTY to its
value, written by an atomic and polled by a volatile load, both relaxed and of the whole word.
A word that is there is all there, and no other memory is read on its account: no fence needed.
"""

import torch
import triton
import triton.language as tl

from kexue_kernels.triton_common import (
    constant,
    from_bits,
    inline,
    is_zero,
    multiply,
    multiply_add,
    pair,
    select,
    unpack,
)

EMPTY = tl.constexpr(-1)  # two NaNs
_OTHER_NANS = tl.constexpr(0x7FC000007FC00000)
_IDENTITY = tl.constexpr(0x3F800000)  # a = 1, b = 0


def new_chain(rows: int, width: int, window: int, device: torch.device) -> torch.Tensor:
    """An EMPTY chain of `rows` chunks, int64 [R, width]: a row for the ticket counter, then one
    for each chunk, each whole group and each whole span."""
    total = 1 + rows + (rows // window + 1) + (rows // window**2 + 1)
    return torch.full((total, width), EMPTY.value, dtype=torch.int64, device=device)


@inline
def apply(a, b, state):
    """The state after a run. A zero state leaves b alone: the run's product may have
    overflowed, and infinity times zero is not zero."""
    return select(is_zero(state), b, multiply_add(a, state, b))


@inline
def then(a1, b1, a2, b2):
    """The run (a1, b1), then (a2, b2)."""
    return multiply(a2, a1), apply(a2, b2, b1)


@triton.jit
def then_real(a1, b1, a2, b2):
    a, b = then((a1,), (b1,), (a2,), (b2,))
    return a[0], b[0]


@triton.jit
def then_complex(a1_re, a1_im, b1_re, b1_im, a2_re, a2_im, b2_re, b2_im):
    a, b = then((a1_re, a1_im), (b1_re, b1_im), (a2_re, a2_im), (b2_re, b2_im))
    return a[0], a[1], b[0], b[1]


@inline
def column_sums(x):
    if len(x) == 2:
        return (tl.sum(x[0], 0, keep_dims=True), tl.sum(x[1], 0, keep_dims=True))
    else:
        return (tl.sum(x[0], 0, keep_dims=True),)


@inline
def scan_runs(a, b):
    """For runs [RUNS, D]: what each and all those before it do."""
    if len(a) == 2:
        found = tl.associative_scan((a[0], a[1], b[0], b[1]), 0, then_complex)
        return (found[0], found[1]), (found[2], found[3])
    else:
        found = tl.associative_scan((a[0], b[0]), 0, then_real)
        return (found[0],), (found[1],)


# One-dimensional gathers move a row between threads. They also end what Triton calls layout
# propagation: without them the layout of the published words would spread into the tile.
@inline
def _last_row(x, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    at = (ROWS - 1) * BLOCK_D + tl.arange(0, BLOCK_D)
    return tl.gather(tl.reshape(x, (ROWS * BLOCK_D,)), at, 0)[None, :]


@inline
def last_row(x, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """[1, BLOCK_D] of x [ROWS, BLOCK_D]."""
    if len(x) == 2:
        return (_last_row(x[0], ROWS, BLOCK_D), _last_row(x[1], ROWS, BLOCK_D))
    else:
        return (_last_row(x[0], ROWS, BLOCK_D),)


@inline
def _rows_before(x, first, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    at = tl.maximum(tl.arange(0, ROWS * BLOCK_D) - BLOCK_D, 0)
    x = tl.gather(tl.reshape(x, (ROWS * BLOCK_D,)), at, 0)
    x = tl.reshape(x, (ROWS, BLOCK_D))
    return tl.where(tl.arange(0, ROWS)[:, None] == 0, first, x)


@inline
def rows_before(x, first, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The row before each of x [ROWS, BLOCK_D], `first` [1, BLOCK_D] before the first."""
    if len(x) == 2:
        re = _rows_before(x[0], first[0], ROWS, BLOCK_D)
        return (re, _rows_before(x[1], first[1], ROWS, BLOCK_D))
    else:
        return (_rows_before(x[0], first[0], ROWS, BLOCK_D),)


@inline
def take_ticket(chain_ptr):
    """0, 1, 2, … in the order that programs start: whoever holds an earlier one is running or
    done, so it can be waited for. The chain's first word counts them, from EMPTY."""
    return tl.atomic_add(chain_ptr, 1, sem="relaxed").to(tl.int32) + 1


@inline
def find_sequence(cu_seqlens_ptr, sequences, row, BLOCK_L: tl.constexpr):
    """The packed sequence that owns a row: the last whose first row is not past it."""
    low = row * 0
    high = low + sequences
    while high - low > 1:
        middle = (low + high) // 2
        past = tl.load(cu_seqlens_ptr + middle) // BLOCK_L + middle > row
        high = tl.where(past, middle, high)
        low = tl.where(past, low, middle)
    return low


@inline
def _word_ptrs(chain_ptr, row, columns, D, COMPLEX: tl.constexpr):
    """Where a row's words are; if complex the real parts', D before the imaginary parts'."""
    width = D * 2 if COMPLEX else D
    return chain_ptr + (row + 1).to(tl.int64) * width + columns


@inline
def _publish(chain_ptr, row, columns, D, a, b):
    """(a, b) [1, BLOCK_D] into a row of the chain."""
    ptrs = _word_ptrs(chain_ptr, row, columns, D, len(a) == 2)
    for part in tl.static_range(len(a)):
        word = pair(a[part], b[part])
        word = tl.where(word == EMPTY, _OTHER_NANS, word)
        tl.atomic_xchg(ptrs + part * D, word, mask=columns < D, sem="relaxed")


@inline
def _poll(ptrs, mask, D, COMPLEX: tl.constexpr):
    words = tl.load(ptrs, mask=mask, other=_IDENTITY, volatile=True, cache_modifier=".cv")
    if COMPLEX:
        return (words, tl.load(ptrs + D, mask=mask, other=0, volatile=True, cache_modifier=".cv"))
    else:
        return (words,)


@inline
def _any_empty(words):
    empty = words[0] == EMPTY
    if len(words) == 2:
        empty = empty | (words[1] == EMPTY)
    return tl.max(empty.to(tl.int32)) > 0


@inline
def await_runs(chain_ptr, rows, wanted, columns, D, COMPLEX: tl.constexpr):
    """(a, b) [R, BLOCK_D] from `rows` [R, 1], once all that are `wanted` are there; the
    identity from the others."""
    ptrs = _word_ptrs(chain_ptr, rows, columns, D, COMPLEX)
    mask = wanted & (columns < D)
    words = _poll(ptrs, mask, D, COMPLEX)
    while _any_empty(words):
        words = _poll(ptrs, mask, D, COMPLEX)
    if COMPLEX:
        a = (from_bits(words[0]), from_bits(words[1]))
        return a, (from_bits(words[0] >> 32), from_bits(words[1] >> 32))
    else:
        return (from_bits(words[0]),), (from_bits(words[0] >> 32),)


@inline
def enter_chunk(
    chain_ptr, first_row, rows, chunk, chunks, first_ptrs, columns, D,
    a, b, WINDOW: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The state [1, BLOCK_D] that enters a chunk; tells the chunks after it what it does.

    (a, b) is what the chunk does. Its sequence has `chunks` of the `rows` that all sequences
    have, from `first_row` on; `first_ptrs` is to what enters the sequence (None: zero).
    """
    COMPLEX: tl.constexpr = len(a) == 2
    SPAN: tl.constexpr = WINDOW * WINDOW
    # what ends with a chunk's row r is at r // WINDOW among groups, r // SPAN among spans
    group_row = rows + (first_row + WINDOW - 1) // WINDOW
    span_row = rows + (rows // WINDOW + 1) + (first_row + SPAN - 1) // SPAN
    span = chunk // SPAN
    group = chunk // WINDOW
    chunk_in_group = chunk % WINDOW
    group_in_span = group % WINDOW

    followed = chunk + 1 < chunks
    ends_group = chunk_in_group == WINDOW - 1
    ends_span = ends_group & (group_in_span == WINDOW - 1)
    if followed & (chunk_in_group != WINDOW - 1):
        _publish(chain_ptr, first_row + chunk, columns, D, a, b)
    if followed & ends_group & (group_in_span != WINDOW - 1):
        w = tl.arange(0, WINDOW)[:, None]
        group_rows = first_row + group * WINDOW + w
        a_runs, b_runs = await_runs(chain_ptr, group_rows, w < WINDOW - 1, columns, D, COMPLEX)
        a_runs, b_runs = scan_runs(a_runs, b_runs)
        a_before = last_row(a_runs, WINDOW, BLOCK_D)
        b_before = last_row(b_runs, WINDOW, BLOCK_D)
        a_group, b_group = then(a_before, b_before, a, b)
        _publish(chain_ptr, group_row + group, columns, D, a_group, b_group)

    # the state that enters the span, as a run that forgets; the span's groups; the group's chunks
    w = tl.arange(0, 2 * WINDOW)[:, None]
    before = tl.where(w == 0, span_row + span - 1, group_row + span * WINDOW + w - 1)
    before = tl.where(w < WINDOW, before, first_row + group * WINDOW + w - WINDOW)
    wanted = (w <= group_in_span) & ((w > 0) | (span > 0))
    wanted = wanted | ((w >= WINDOW) & (w < WINDOW + chunk_in_group))
    a_runs, b_runs = await_runs(chain_ptr, before, wanted, columns, D, COMPLEX)
    if first_ptrs is not None:
        first = tl.load(first_ptrs, mask=(columns < D) & (span == 0), other=0)
        b_runs = select((w == 0) & (span == 0), unpack(first, None), b_runs)
    _, b_runs = scan_runs(a_runs, b_runs)
    state = last_row(b_runs, 2 * WINDOW, BLOCK_D)
    if followed & ends_span:
        zero = constant(0.0, (1, BLOCK_D), COMPLEX)
        _publish(chain_ptr, span_row + span, columns, D, zero, apply(a, b, state))
    return state
