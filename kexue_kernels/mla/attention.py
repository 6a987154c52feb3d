"""mla_attention: training and prefill from the latents."""

import torch
from torch import Tensor

from kexue_kernels import autocast, checks, dispatch, launchers, options
from kexue_kernels.mla import attention_operators, reference

Data = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def mla_attention(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multi-head latent attention over whole sequences, for training and prefill.

    Head h has keys k_j = [w_uk[h] kv_latent_j, k_rope_j] and values v_j = w_uv[h] kv_latent_j;
    out = softmax(q k^T softmax_scale) v with q = [q_nope, q_rope]. Keys and values of all heads
    never exist at once: they are made for a few heads at a time, and again in the backward.

    Args:
        q_nope: [B, T, H, dk], queries of what carries no position; float32, bfloat16 or float16
            (float64 is served by the reference).
        q_rope: [B, T, H, dr], queries that carry positions, turned by RoPE. dr may be 0.
        kv_latent: [B, T, dc], of which keys and values are made.
        k_rope: [B, T, dr], the key of all heads that carries positions, turned by RoPE.
        w_uk: [H, dk, dc], a head's keys from the latent.
        w_uv: [H, dv, dc], a head's values from the latent.
            All six in one dtype, any strides.
        softmax_scale: what scores are multiplied by; (dk + dr)**-0.5 if None.
        causal: token i sees tokens j <= i of its sequence; else all of them.
        cu_seqlens: int32 or int64 [N + 1], the boundaries of N sequences packed along T in a
            batch of 1: 0 first, T last, never descending (checked where that needs no copy
            from a GPU). A token sees its own sequence alone.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        out [B, T, H, dv] in the inputs' dtype, contiguous. Accumulation is in float32.

    Differentiable in all six, once (the reference: any number of times). Training keeps, beside
    the inputs, the output and a float32 number for each query and head. The same inputs give
    bitwise the same results on the same device (on CPU also with the same number of threads).
    Under autocast the inputs are taken in its dtype.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a wrong shape, dtype, device or value, named.
        BackendUnavailableError: a forced backend that can't serve the call.

    Source: DeepSeek-AI, "DeepSeek-V2" (2024), section 2.1; tiles as in Dao, "FlashAttention-2"
    (2023).
    """
    data = _taken(
        q_nope=q_nope, q_rope=q_rope, kv_latent=kv_latent, k_rope=k_rope, w_uk=w_uk, w_uv=w_uv
    )
    q_nope = data[0]
    if cu_seqlens is not None:
        checks.cu_seqlens(cu_seqlens, q_nope, "q_nope")
    scale = _scale(softmax_scale, q_nope.shape[3] + q_rope.shape[3])
    checks.boolean("causal", causal)
    backend = dispatch.resolve(backend)
    if _served_by_reference(data, backend):
        return reference.mla_attention(
            *data, softmax_scale=scale, causal=causal, cu_seqlens=cu_seqlens
        )
    out, _ = attention_operators.mla_attention(*data, cu_seqlens, scale, causal, backend)
    return out


def _taken(**given: Tensor) -> Data:
    """The data arguments after their checks, in the dtype they are computed with."""
    for name, value in given.items():
        checks.tensor(name, value)
    q_nope, q_rope, kv_latent, k_rope, w_uk, w_uv = _in_autocast_dtype(*given.values())
    checks.dtype("q_nope", q_nope, checks.REAL)
    checks.ndim("q_nope", q_nope, 4, "[B, T, H, dk]")
    checks.ndim("q_rope", q_rope, 4, "[B, T, H, dr]")
    checks.ndim("kv_latent", kv_latent, 3, "[B, T, dc]")
    checks.ndim("w_uv", w_uv, 3, "[H, dv, dc]")
    B, T, H, dk = q_nope.shape
    dr, dc, dv = q_rope.shape[3], kv_latent.shape[2], w_uv.shape[1]
    expected = (
        ("q_rope", q_rope, (B, T, H, dr), "[B, T, H, dr]"),
        ("kv_latent", kv_latent, (B, T, dc), "[B, T, dc]"),
        ("k_rope", k_rope, (B, T, dr), "[B, T, dr]"),
        ("w_uk", w_uk, (H, dk, dc), "[H, dk, dc]"),
        ("w_uv", w_uv, (H, dv, dc), "[H, dv, dc]"),
    )
    for name, value, shape, axes in expected:
        checks.dtype(name, value, (q_nope.dtype,))
        checks.shape(name, value, shape, axes)
        checks.device(name, value, q_nope.device, "q_nope")
    return q_nope, q_rope, kv_latent, k_rope, w_uk, w_uv


def _in_autocast_dtype(*tensors: Tensor) -> list[Tensor]:
    """As `scaled_dot_product_attention` takes them: in autocast's dtype where that is on."""
    kind = tensors[0].device.type
    if not autocast.enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [x.to(dtype) if x.dtype in checks.HALF_AND_SINGLE else x for x in tensors]


def _scale(softmax_scale: float | None, width: int) -> float:
    if softmax_scale is None:
        return float(max(width, 1) ** -0.5)
    options.finite("softmax_scale", softmax_scale)
    return float(softmax_scale)


def _served_by_reference(data: Data, backend: str) -> bool:
    """Doubles and what is empty go to the reference, which autograd follows at every order."""
    q_nope, _, kv_latent, _, _, w_uv = data
    if launchers.served_by_reference("mla_attention", q_nope, backend):
        return True
    if q_nope.numel() == 0 or kv_latent.numel() == 0 or w_uv.numel() == 0:
        launchers.launcher(
            "mla", "mla_attention", backend, q_nope.device, q_nope.dtype
        )  # raises if it can't serve
        return True
    return False
