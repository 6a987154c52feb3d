"""linear_scan in PyTorch without a Python step per time step: where no compiled kernel serves.

L is cut into about sqrt(L) chunks that advance together: once to find what each chunk does to
the state passing through it, then, with the states known, once more to write h.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from kexue_kernels.checks import state_dtype
from kexue_kernels.scan.shift import previous


def forward(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    h = b.new_empty(b.shape)
    B, L, D = b.shape
    bounds = [0, L] if cu_seqlens is None else cu_seqlens.tolist()
    rows = B if cu_seqlens is None else len(bounds) - 1
    if initial_state is None:
        initial_state = b.new_zeros(rows, D, dtype=state_dtype(b.dtype))
    final_state = initial_state.clone()
    a = a.expand(b.shape)
    for n, (start, end) in enumerate(pairwise(bounds)):
        own = slice(None) if cu_seqlens is None else slice(n, n + 1)
        steps = slice(start, end)
        if end > start:
            final_state[own] = _scan(
                a[:, steps], b[:, steps], h[:, steps], initial_state[own], reverse
            )
    return h, final_state if return_final_state else None


def backward(
    a: Tensor,
    h: Tensor | None,
    initial_state: Tensor | None,
    grad_h: Tensor,
    grad_final: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    time_invariant = a.shape[1] == 1
    a = a.expand(grad_h.shape)
    rows = grad_h.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    ones = a.new_ones(rows, a.shape[2])
    # conj_physical: below torch.compile, lazy conjugation is not seen inside an operator
    a_next = torch.conj_physical(previous(a, ones, cu_seqlens, not reverse))
    grad_b, last = forward(a_next, grad_h, grad_final, cu_seqlens, not reverse, True)
    assert last is not None
    grad_initial = None
    if initial_state is not None:
        grad_initial = last * torch.conj_physical(_first(a, cu_seqlens, reverse))
    if h is None:
        return None, grad_b, grad_initial
    h_before = previous(h, initial_state, cu_seqlens, reverse)
    grad_a = grad_b.to(last.dtype) * torch.conj_physical(h_before)
    if time_invariant:
        grad_a = grad_a.sum(1, keepdim=True)
    return grad_a, grad_b, grad_initial


def _first(a: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> Tensor:
    """The first a that each sequence's scan meets; 1 where the sequence is empty."""
    if cu_seqlens is None:
        return a[:, -1] if reverse else a[:, 0]
    at = cu_seqlens[1:] - 1 if reverse else cu_seqlens[:-1]
    empty = cu_seqlens[1:] == cu_seqlens[:-1]
    return a[0, at.clamp(0, a.shape[1] - 1)].masked_fill(empty[:, None], 1)


def _scan(a: Tensor, b: Tensor, h: Tensor, state: Tensor, reverse: bool) -> Tensor:
    """Fill h [B, L, D] from the state [B, D] that enters; return the state that leaves."""
    L = b.shape[1]
    K = max(1, math.isqrt(L))
    whole = L - L % K

    def chunks(state: Tensor) -> Tensor:
        a_c, b_c, h_c = (x[:, :whole].unflatten(1, (-1, K)) for x in (a, b, h))
        return _scan_chunks(a_c, b_c, h_c, state, reverse)

    def tail(state: Tensor) -> Tensor:
        return _advance(a[:, whole:], b[:, whole:], h[:, whole:], state, reverse)

    return chunks(tail(state)) if reverse else tail(chunks(state))


def _scan_chunks(a: Tensor, b: Tensor, h: Tensor, state: Tensor, reverse: bool) -> Tensor:
    """As `_scan`, over [B, C, K, D]: C chunks of K steps."""
    local = state.new_zeros(a.shape[0], a.shape[1], a.shape[3])
    product = torch.ones_like(local)
    for k in _order(a.shape[2], reverse):
        a_k = a[:, :, k].to(state.dtype)
        product = a_k * product
        local = a_k * local + b[:, :, k]
    enters = torch.empty_like(local)
    for c in _order(a.shape[1], reverse):
        enters[:, c] = state
        # a product that overflowed must not meet a zero state: inf * 0 is NaN
        state = torch.where(state == 0, local[:, c], product[:, c] * state + local[:, c])
    _advance(a, b, h, enters, reverse, dim=2)
    return state


def _advance(a: Tensor, b: Tensor, h: Tensor, state: Tensor, reverse: bool, dim: int = 1) -> Tensor:
    """h_t = a_t h_{t-1} + b_t along `dim`, a step at a time."""
    for t in _order(b.shape[dim], reverse):
        state = a.select(dim, t).to(state.dtype) * state + b.select(dim, t)
        h.select(dim, t).copy_(state)
    return state


def _order(steps: int, reverse: bool) -> range:
    return range(steps - 1, -1, -1) if reverse else range(steps)
