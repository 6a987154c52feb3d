"""The registered operators of mla_attention.

Launcher modules `<backend>_mla_attention`, given non-empty plain tensors of any strides (dr may
be 0), cu_seqlens int32 contiguous or None:

    forward(q_nope [B, T, H, dk], q_rope [B, T, H, dr], kv_latent [B, T, dc], k_rope [B, T, dr],
        w_uk [H, dk, dc], w_uv [H, dv, dc], softmax_scale, causal, cu_seqlens)
        -> (out [B, T, H, dv], lse float32 [B, H, T], natural log), contiguous
    backward(grad [B, T, H, dv], the six, out, lse, softmax_scale, causal, cu_seqlens, wanted)
        -> the six gradients, contiguous; None where `wanted`, six bools, has False
"""

from typing import Any

import torch
from torch import Tensor

from kexue_kernels import registry
from kexue_kernels.checks import cu_seqlens_values, state_dtype
from kexue_kernels.launchers import launcher_of
from kexue_kernels.mla.operators import plain

NAMES = ("q_nope", "q_rope", "kv_latent", "k_rope", "w_uk", "w_uv")
_DATA = ", ".join(f"Tensor {name}" for name in NAMES)
_OPTIONS = "Tensor? cu_seqlens, float softmax_scale, bool causal"
_WANTED = ", ".join(f"bool want_{name}" for name in NAMES)
_GRADS = ", ".join(f"Tensor grad_{name}" for name in NAMES)


def _fake(q_nope: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    w_uv = rest[4]
    B, T, H, _ = q_nope.shape
    lse = q_nope.new_empty((B, H, T), dtype=state_dtype(q_nope.dtype))
    return q_nope.new_empty((B, T, H, w_uv.shape[1])), lse


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *data, cu_seqlens, scale, causal, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*data, *output, cu_seqlens)
    ctx.options = scale, causal, backend


def _grad(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:6]
    if grad is None or not any(wanted):
        return (None,) * 10
    *tensors, cu_seqlens = ctx.saved_tensors
    scale, causal, backend = ctx.options
    found = mla_attention_backward(grad, *tensors, cu_seqlens, scale, causal, *wanted, backend)
    grads = (g if want else None for g, want in zip(found, wanted, strict=True))
    return *grads, None, None, None, None


@registry.operator(
    f"mla_attention({_DATA}, {_OPTIONS}, str backend) -> (Tensor out, Tensor lse)",
    fake=_fake,
    setup_context=_setup,
    backward=_grad,
)
def mla_attention(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    cu_seqlens: Tensor | None,
    softmax_scale: float,
    causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, dv], and lse [B, H, T] for the backward."""
    data = [plain(x) for x in (q_nope, q_rope, kv_latent, k_rope, w_uk, w_uv)]
    bounds = _bounds(cu_seqlens, q_nope.shape[1])
    launcher = launcher_of("mla", "mla_attention", backend, q_nope)
    return launcher.forward(*data, softmax_scale, causal, bounds)


def _backward_fake(grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    data, wanted = rest[:6], rest[-7:-1]
    return tuple(
        x.new_empty(x.shape) if want else registry.nothing(grad)
        for x, want in zip(data, wanted, strict=True)
    )


@registry.operator(
    f"mla_attention_backward(Tensor grad, {_DATA}, Tensor out, Tensor lse, {_OPTIONS}, {_WANTED}, "
    f"str backend) -> ({_GRADS})",
    fake=_backward_fake,
    setup_context=registry.keep_nothing,
    backward=registry.refuse_gradient("the gradient of mla_attention"),
)
def mla_attention_backward(grad: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    """A gradient for each of the six, of its shape; empty where not wanted."""
    *tensors, cu_seqlens, softmax_scale, causal = args[:11]
    *wanted, backend = args[11:]
    bounds = _bounds(cu_seqlens, grad.shape[1])
    launcher = launcher_of("mla", "mla_attention", backend, grad)
    return launcher.backward(
        plain(grad), *map(plain, tensors), softmax_scale, causal, bounds, tuple(wanted)
    )


def _bounds(cu_seqlens: Tensor | None, T: int) -> Tensor | None:
    """As int32; values checked where reading them costs no synchronisation."""
    if cu_seqlens is None:
        return None
    if cu_seqlens.device.type == "cpu":
        cu_seqlens_values(cu_seqlens, T)
    return cu_seqlens.to(torch.int32).contiguous()
