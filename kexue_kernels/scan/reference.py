"""The scan family in plain PyTorch: the recurrences as they are written down."""

from itertools import pairwise

import torch
from torch import Tensor

from kexue_kernels.checks import cu_seqlens_values, state_dtype


def linear_scan(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = a_t h_{t-1} + b_t, one step at a time. See `kexue_kernels.linear_scan`."""
    dtype = state_dtype(b.dtype)
    a = a.to(dtype).expand(b.shape)  # a view: [B, L, D] by strides
    if cu_seqlens is None:
        h, state = _scan(a, b.to(dtype), initial_state, reverse)
    else:
        h, state = _scan_packed(a, b.to(dtype), initial_state, reverse, cu_seqlens)
    h = h.to(b.dtype)
    return (h, state) if return_final_state else h


def _scan(
    a: Tensor, b: Tensor, initial_state: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    B, L, D = b.shape
    state = b.new_zeros(B, D) if initial_state is None else initial_state.to(b.dtype)
    a_steps, b_steps = a.unbind(1), b.unbind(1)  # [B, D] each
    h: list[Tensor] = [state] * L
    for t in reversed(range(L)) if reverse else range(L):
        state = a_steps[t] * state + b_steps[t]
        h[t] = state
    return torch.stack(h, dim=1) if L else a * b, state.clone()


def _scan_packed(
    a: Tensor, b: Tensor, initial_state: Tensor | None, reverse: bool, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    bounds = cu_seqlens_values(cu_seqlens, b.shape[1])
    hs, states = [b[:, :0]], [b.new_zeros(0, b.shape[2])]
    for n, (start, end) in enumerate(pairwise(bounds)):
        first = None if initial_state is None else initial_state[n : n + 1]
        h, state = _scan(a[:, start:end], b[:, start:end], first, reverse)
        hs.append(h)
        states.append(state)
    return torch.cat(hs, dim=1), torch.cat(states)
