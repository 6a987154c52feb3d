"""What a Mamba mixer does between its projections, for any module with Mamba's parameter names.

`m` below has `in_proj`, `conv1d`, `act`, `x_proj`, `dt_proj`, `A_log`, `D` and `out_proj`, as
`kexue_kernels.nn.MambaMixer` and the mixers of Transformers. d are its inner channels, n its
states, K its convolution's taps; windows are those of `convolution`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from kexue_kernels import dispatch
from kexue_kernels.checks import DOUBLE, state_dtype
from kexue_kernels.nn.scan.convolution import convolved, convolved_packed, convolved_step, taps
from kexue_kernels.scan import selective_operators, selective_scan, selective_state_update

Mixer = Any
Selected = tuple[Tensor, Tensor, Tensor]
Normalise = Callable[[Tensor, Tensor, Tensor], Selected]  # of x_proj's dt, B and C


def mix(
    m: Mixer,
    x: Tensor,
    window: Tensor | None = None,
    state: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalise: Normalise | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [B, L, dim], the last window, the last state) for x [B, L, dim]; `mask` is [B, L]."""
    u, z = m.in_proj(_masked(x, mask)).chunk(2, dim=-1)
    if cu_seqlens is None:
        u, window = convolved(u, window, m.conv1d)
    else:
        u, window = convolved_packed(u, window, m.conv1d, cu_seqlens)
    u = _masked(_activated(m, u), mask)
    delta, B, C = _selected(m, u, normalise)
    y, state = selective_scan(
        u,
        delta,
        _A(m),
        B,
        C,
        m.D,
        z,
        _dt_bias(m),
        True,
        initial_state=state,
        return_final_state=True,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    return m.out_proj(y), window, state


class Constants(NamedTuple):
    """What a step needs of the parameters, in the form and dtype it needs it."""

    taps: Tensor  # [K, d]
    A: Tensor  # [1, d, n]: one head, as `selective_state_update` has them
    D: Tensor  # [1, d]
    dt_bias: Tensor | None  # [1, d]


def constants(m: Mixer) -> Constants:
    """Without gradients, for `mix_step`."""
    wide, bias = state_dtype(m.D.dtype), _dt_bias(m)
    return Constants(
        taps(m.conv1d, wide).contiguous().detach(),
        _A(m)[None].detach(),
        m.D.to(wide)[None].detach(),
        None if bias is None else bias.to(wide)[None].detach(),
    )


def mix_step(
    m: Mixer,
    x: Tensor,
    window: Tensor,
    state: Tensor,
    *,
    prepared: Constants | None = None,
    normalise: Normalise | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(y [B, 1, dim], the last K inputs [B, K, d]) for x [B, 1, dim]; `state` is updated in place.

    Without gradients. `prepared` are the mixer's `constants`, if the caller has them. The axis
    of one is that of time, and then that of heads for `selective_state_update`.
    """
    own = constants(m) if prepared is None else prepared
    u, z = m.in_proj(x).chunk(2, dim=-1)
    u, inputs = convolved_step(u, window, own.taps, m.conv1d.bias)
    u = _activated(m, u)
    delta, B, C = _selected(m, u, normalise)
    y = _update(state[:, None], u, delta, own.A, B, C, own.D, z, own.dt_bias, backend)
    return m.out_proj(y), inputs


def _update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor | None,
    backend: str,
) -> Tensor:
    """selective_state_update; its operator at once where nothing needs checking or widening."""
    inputs = state, x, dt, A, B, C, D, z, dt_bias, True
    if x.dtype in DOUBLE or not x.numel() or dispatch.resolve(backend) == "reference":
        return selective_state_update(*inputs, backend=backend)
    return selective_operators.selective_state_update(*inputs, None, backend)


def _selected(m: Mixer, u: Tensor, normalise: Normalise | None) -> Selected:
    """delta, without the bias of a plain dt_proj (`_dt_bias`), B and C."""
    found, n = m.x_proj(u), m.A_log.shape[1]
    dt, B, C = found.split((found.shape[-1] - 2 * n, n, n), dim=-1)
    if normalise is not None:
        dt, B, C = normalise(dt, B, C)
    delta = F.linear(dt, m.dt_proj.weight) if _is_plain(m.dt_proj) else m.dt_proj(dt)
    return delta, B, C


def _dt_bias(m: Mixer) -> Tensor | None:
    """What the scan adds to delta, in float32."""
    return m.dt_proj.bias if _is_plain(m.dt_proj) else None


def _is_plain(linear: nn.Module) -> bool:
    return type(linear) is nn.Linear


def _A(m: Mixer) -> Tensor:
    return -m.A_log.to(state_dtype(m.A_log.dtype)).exp()


def _activated(m: Mixer, u: Tensor) -> Tensor:
    return F.silu(u) if isinstance(m.act, nn.SiLU) else m.act(u)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else (x * mask[:, :, None]).to(x.dtype)
