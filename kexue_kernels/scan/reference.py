"""The scan family in plain PyTorch: the recurrences as they are written down."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kexue_kernels.checks import cu_seqlens_values, state_dtype
from kexue_kernels.scan.mamba_layout import channels_first


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


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba's S6, one step at a time. See `kexue_kernels.selective_scan`.

    x_t = exp(dt_t A) x_{t-1} + dt_t B_t u_t,  y_t = C_t x_t,  out = (y + D u) silu(z)
    """
    dtype = state_dtype(u.dtype)
    inputs = u.to(dtype)
    dt = delta.to(dtype)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)
    if delta_softplus:
        dt = F.softplus(dt)
    states = _initial_states(u, A, initial_state, cu_seqlens)
    ys, finals = [inputs[:, :0]], [states[:0]]
    B, C = _grouped(B, A), _grouped(C, A)
    for rows, steps in _sequences(u, cu_seqlens):
        B_, C_ = (m if m.shape[1] == 1 else m[:, steps] for m in (B, C))
        y, state = _selective(inputs[:, steps], dt[:, steps], A, B_, C_, states[rows])
        ys.append(y)
        finals.append(state)
    out = torch.cat(ys, dim=1)  # [batch, L, d]
    if D is not None:
        out = out + D.to(dtype) * inputs
    if z is not None:
        out = out * F.silu(z.to(dtype))
    out = out.to(u.dtype)
    return (out, torch.cat(finals)) if return_final_state else out


def _selective(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """y [batch, L, d] and the last state [batch, d, n], for B and C as `_grouped` gives them."""
    ys = []
    for t in range(u.shape[1]):
        dt_t, u_t = dt[:, t, :, None], u[:, t, :, None]  # [batch, d, 1]
        x = torch.exp(dt_t * A) * x + dt_t * _step(B, t, A) * u_t
        y = (_step(C, t, A) * x).sum(-1)
        ys.append(2 * y.real if y.is_complex() else y)
    return torch.stack(ys, dim=1) if ys else u, x.clone()


def _grouped(matrix: Tensor, A: Tensor) -> Tensor:
    """B or C in A's dtype as [batch, L, groups, n]; time-invariant: [1, 1, d, n]."""
    matrix = matrix.to(A.dtype)
    if matrix.ndim == 2:
        return matrix[None, None]
    return matrix[:, :, None] if matrix.ndim == 3 else matrix


def _step(matrix: Tensor, t: int, A: Tensor) -> Tensor:
    """Step t of a grouped matrix: [batch or 1, d, n]."""
    at = matrix[:, t if matrix.shape[1] > 1 else 0]
    return at.repeat_interleave(A.shape[0] // at.shape[1], dim=1)


def _initial_states(
    u: Tensor, A: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    if initial_state is not None:
        return initial_state.to(A.dtype)
    rows = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return A.new_zeros(rows, *A.shape)


def _sequences(u: Tensor, cu_seqlens: Tensor | None) -> list[tuple[slice, slice]]:
    """Which states, and which steps, of each sequence (of all at once where none are packed)."""
    if cu_seqlens is None:
        return [(slice(None), slice(None))]
    bounds = pairwise(cu_seqlens_values(cu_seqlens, u.shape[1]))
    return [(slice(n, n + 1), slice(*steps)) for n, steps in enumerate(bounds)]


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan` in mamba-ssm's layout. See `kexue_kernels.selective_scan_fn`."""
    return channels_first(selective_scan)(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state
    )


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step of the selective scan, in place. See `kexue_kernels.selective_state_update`."""
    dtype = state_dtype(x.dtype)
    rows = torch.arange(x.shape[0], device=x.device)
    kept = rows if state_batch_indices is None else state_batch_indices.long()
    valid = kept >= 0
    wide = [None if m is None else m.to(dtype) for m in (x, dt, B, C, D, z, dt_bias)]
    x_, dt_, B_, C_, D_, z_, dt_bias_ = wide
    assert x_ is not None
    assert dt_ is not None
    dt_ = dt_ if dt_bias_ is None else dt_ + dt_bias_
    dt_ = (F.softplus(dt_) if dt_softplus else dt_)[..., None]  # [batch, (H,) P, 1]
    B_, C_ = (_of_heads(m, x) for m in (B_, C_))
    before = state.new_zeros((x.shape[0], *state.shape[1:]), dtype=dtype)  # [batch, (H,) P, n]
    before[valid] = state[kept[valid]].to(dtype)
    after = before * torch.exp(dt_ * A.to(dtype)) + dt_ * B_ * x_[..., None]
    state[kept[valid]] = after[valid].to(state.dtype)
    y = (after * C_).sum(-1)
    y = y if D_ is None else y + D_ * x_
    y = y if z_ is None else y * F.silu(z_)
    return torch.where(valid.view(-1, *(1,) * (x.ndim - 1)), y, 0).to(x.dtype)


def _of_heads(matrix: Tensor | None, x: Tensor) -> Tensor:
    """B or C [batch, (G,) n] as [batch, 1, n], or with heads as [batch, H, 1, n]."""
    assert matrix is not None
    matrix = matrix if matrix.ndim == 3 else matrix[:, None]
    if x.ndim == 2:
        return matrix
    return matrix.repeat_interleave(x.shape[1] // matrix.shape[1], dim=1)[:, :, None]
