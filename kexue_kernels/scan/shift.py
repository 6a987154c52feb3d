"""The step before each step, in the direction of the scan, for dense and packed batches."""

import torch
from torch import Tensor


def previous(x: Tensor, first: Tensor | None, cu_seqlens: Tensor | None, reverse: bool) -> Tensor:
    """x_{t-1} at every t of x [B, L, D]; `first` [B or N, D] (zeros if None) where t is a start."""
    if first is None:
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        first = x.new_zeros(rows, x.shape[2])
    first = first.to(x.dtype)
    if cu_seqlens is None:
        parts = [x[:, 1:], first[:, None]] if reverse else [first[:, None], x[:, :-1]]
        return torch.cat(parts, dim=1)
    sequence, starts = _starts(x, cu_seqlens, reverse)
    shifted = torch.roll(x, -1 if reverse else 1, dims=1)
    return torch.where(starts[:, None], first[sequence], shifted)


def previous_adjoint(
    flow: Tensor, cu_seqlens: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The transpose of `previous`: what flows into x [B, L, D] and into `first`."""
    if cu_seqlens is None:
        zero = torch.zeros_like(flow[:, :1])
        if reverse:
            return torch.cat([zero, flow[:, :-1]], dim=1), flow[:, -1]
        return torch.cat([flow[:, 1:], zero], dim=1), flow[:, 0]
    _, starts = _starts(flow, cu_seqlens, reverse)
    kept = flow.masked_fill(starts[:, None], 0)
    at = cu_seqlens[1:] - 1 if reverse else cu_seqlens[:-1]
    empty = cu_seqlens[1:] == cu_seqlens[:-1]
    into_first = flow[0, at.clamp(0, flow.shape[1] - 1)].masked_fill(empty[:, None], 0)
    return torch.roll(kept, 1 if reverse else -1, dims=1), into_first


def _starts(x: Tensor, cu_seqlens: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """For each of the L steps: its sequence, and whether the scan enters that sequence there."""
    steps = torch.arange(x.shape[1], device=x.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), steps, right=True)
    edge = cu_seqlens[1:][sequence] - 1 if reverse else cu_seqlens[:-1][sequence]
    return sequence, steps == edge
