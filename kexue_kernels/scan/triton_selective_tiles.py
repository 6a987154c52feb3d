"""Tiles of selective_scan's backward, RUNS runs of RUN steps: scans from the last run to the first,
and sums over channels."""

import triton.language as tl

from kexue_kernels.scan.triton_chained_scan import then_complex, then_real
from kexue_kernels.scan.triton_selective_maths import store_number
from kexue_kernels.triton_common import inline


@inline
def scan_runs_back(a, b):
    """For runs [RUNS, D]: what each and all those after it do, the last first."""
    if len(a) == 2:
        found = tl.associative_scan((a[0], a[1], b[0], b[1]), 0, then_complex, reverse=True)
        return (found[0], found[1]), (found[2], found[3])
    else:
        found = tl.associative_scan((a[0], b[0]), 0, then_real, reverse=True)
        return (found[0],), (found[1],)


@inline
def _rows_after(x, last, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    at = tl.minimum(tl.arange(0, ROWS * BLOCK_D) + BLOCK_D, ROWS * BLOCK_D - 1)
    x = tl.gather(tl.reshape(x, (ROWS * BLOCK_D,)), at, 0)
    x = tl.reshape(x, (ROWS, BLOCK_D))
    return tl.where(tl.arange(0, ROWS)[:, None] == ROWS - 1, last, x)


@inline
def rows_after(x, last, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The row after each of x [ROWS, BLOCK_D], `last` [1, BLOCK_D] after the last."""
    if len(x) == 2:
        re = _rows_after(x[0], last[0], ROWS, BLOCK_D)
        return (re, _rows_after(x[1], last[1], ROWS, BLOCK_D))
    else:
        return (_rows_after(x[0], last[0], ROWS, BLOCK_D),)


@inline
def _sums_over_channels(xs):
    """[RUNS, steps] of a tuple, by steps, of [RUNS, BLOCK_D]: as one tensor, so that threads meet
    once for all."""
    RUN: tl.constexpr = len(xs)
    RUNS: tl.constexpr = xs[0].shape[0]
    half: tl.constexpr = RUN // 2
    if half == 0:
        return tl.sum(xs[0], 1)[:, None]
    else:
        joined = ()
        for r in tl.static_range(half):
            joined = joined + (tl.join(xs[r], xs[r + half]),)
        return tl.reshape(_joined_sums(joined), (RUNS, RUN))


@inline
def _joined_sums(xs):
    half: tl.constexpr = len(xs) // 2
    if half == 0:
        return tl.sum(xs[0], 1)
    else:
        joined = ()
        for r in tl.static_range(half):
            joined = joined + (tl.join(xs[r], xs[r + half]),)
        return _joined_sums(joined)


@inline
def _parts(xs, part: tl.constexpr):
    parts = ()
    for r in tl.static_range(len(xs)):
        parts = parts + (xs[r][part],)
    return parts


@inline
def store_sums(ptr, xs, s, left, RUN: tl.constexpr):
    """A row of time [L], from `ptr` on, of sums over channels of each step's number."""
    steps = s + tl.arange(0, RUN)[None, :]
    if len(xs[0]) == 2:
        re = _sums_over_channels(_parts(xs, 0))
        store_number(ptr, steps, (re, _sums_over_channels(_parts(xs, 1))), steps < left)
    else:
        store_number(ptr, steps, (_sums_over_channels(_parts(xs, 0)),), steps < left)
