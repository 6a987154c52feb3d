"""What a Mamba mixer does between its projections, for any module with Mamba's parameter names.

`m` below has `in_proj`, `conv1d`, `act`, `x_proj`, `dt_proj`, `A_log`, `D` and `out_proj`, as
`kexue_kernels.nn.MambaMixer` and the mixers of Transformers. d are its inner channels, n its
states, K its convolution's taps; windows are those of `convolution`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue_kernels import dispatch
from kexue_kernels.checks import DOUBLE, state_dtype
from kexue_kernels.nn.scan.convolution import (
    convolved,
    convolved_packed,
    convolved_silu,
    convolved_step,
    taps,
)
from kexue_kernels.scan import (
    mamba_operators,
    selective_operators,
    selective_scan,
    selective_state_update,
)

Mixer = Any
Selected = tuple[Tensor, Tensor, Tensor]
Normalise = Callable[[Tensor, Tensor, Tensor], Selected]  # of x_proj's dt, B and C

_SILU = "transformers.activations", "SiLUActivation"  # by name: it need not be installed


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
    u, window = _convolved(m, u, window, cu_seqlens, backend)
    u = _masked(u, mask)
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


@dataclass(frozen=True)
class RMSNormalise:
    """dt, B and C over their root mean squares."""

    eps: float

    def __call__(self, dt: Tensor, B: Tensor, C: Tensor) -> Selected:
        dt, B, C = (
            F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) for x in (dt, B, C)
        )
        return dt, B, C


class Constants(NamedTuple):
    """What a step needs of the parameters, in the form and dtype it needs it."""

    taps: Tensor  # [K, d]
    conv_bias: Tensor | None  # [d]
    A: Tensor  # [1, d, n]: one head, as `selective_state_update` has them
    D: Tensor  # [1, d]
    dt_bias: Tensor | None  # [1, d]


def constants(m: Mixer) -> Constants:
    """Without gradients, for `mix_step`."""
    wide, bias, conv_bias = state_dtype(m.D.dtype), _dt_bias(m), m.conv1d.bias
    return Constants(
        taps(m.conv1d, wide).contiguous().detach(),
        None if conv_bias is None else conv_bias.to(wide).detach(),
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
) -> Tensor:
    """y [B, 1, dim] for x [B, 1, dim]; `window` and `state` are updated in place.

    Without gradients. `prepared` are the mixer's `constants`, if the caller has them. The axis
    of one is that of time, and then that of heads for `selective_state_update`.
    """
    own = constants(m) if prepared is None else prepared
    if _is_one_call(m, x, window, normalise, backend):
        return _step_in_one_call(m, x[:, 0], window, state, own, normalise)[:, None]
    u, z = m.in_proj(x).chunk(2, dim=-1)
    u, inputs = convolved_step(u, window, own.taps, own.conv_bias)
    window.copy_(inputs[:, inputs.shape[1] - window.shape[1] :])
    u = _activated(m, u)
    delta, B, C = _selected(m, u, normalise)
    y = _update(state[:, None], u, delta, own.A, B, C, own.D, z, own.dt_bias, backend)
    return m.out_proj(y)


def _is_one_call(
    m: Mixer, x: Tensor, window: Tensor, normalise: Normalise | None, backend: str
) -> bool:
    """Whether nothing stands between the parts of a step, and `mamba_step` serves it."""
    layers = m.in_proj, m.x_proj, m.dt_proj, m.out_proj
    return (
        window.dtype == x.dtype
        and _is_silu(m.act)
        and (normalise is None or type(normalise) is RMSNormalise)
        and all(map(_is_untouched, layers))
        and not torch.nn.modules.module._has_any_global_hook()
        and layers[1].bias is None
        and mamba_operators.step_serves(x, [layer.weight for layer in layers], backend)
    )


def _step_in_one_call(
    m: Mixer,
    x: Tensor,
    window: Tensor,
    state: Tensor,
    own: Constants,
    normalise: Normalise | None,
) -> Tensor:
    return mamba_operators.mamba_step(
        x,
        window,
        state,
        m.in_proj.weight,
        m.in_proj.bias,
        own.taps,
        own.conv_bias,
        m.x_proj.weight,
        m.dt_proj.weight,
        own.dt_bias,
        own.A,
        own.D,
        m.out_proj.weight,
        m.out_proj.bias,
        normalise.eps if type(normalise) is RMSNormalise else None,
    )


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


def _convolved(
    m: Mixer, u: Tensor, window: Tensor | None, cu_seqlens: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """The activated convolution, and the last window."""
    if cu_seqlens is not None:
        u, window = convolved_packed(u, window, m.conv1d, cu_seqlens)
    elif _is_silu(m.act) and mamba_operators.serve(u, backend):
        return convolved_silu(u, window, m.conv1d)
    else:
        u, window = convolved(u, window, m.conv1d)
    return _activated(m, u), window


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


def _is_untouched(linear: nn.Module) -> bool:
    """Whether calling it is multiplying by its weight, and nobody listens."""
    return _is_plain(linear) and not (
        linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear)
    )


def _A(m: Mixer) -> Tensor:
    return -m.A_log.to(state_dtype(m.A_log.dtype)).exp()


def _activated(m: Mixer, u: Tensor) -> Tensor:
    return F.silu(u) if _is_silu(m.act) else m.act(u)


def _is_silu(act: object) -> bool:
    kind = type(act)
    return act is F.silu or kind is nn.SiLU or (kind.__module__, kind.__name__) == _SILU


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else (x * mask[:, :, None]).to(x.dtype)
