"""mla_cache_append: new tokens' rows into a paged cache of latents."""

import torch
from torch import Tensor

from kexue_kernels import checks, dispatch, launchers
from kexue_kernels.mla import arguments, operators, reference


def mla_cache_append(
    kv_latent: Tensor,
    k_rope: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rope_interleaved: bool = False,
    backend: str = "auto",
) -> None:
    """Write T tokens' latents and keys into a paged cache, in place: what `mla_decode` reads.

    The latent goes first in a row, normalised to norm_weight * x / sqrt(mean(x^2) + norm_eps)
    where a weight is given; then the key, turned by its token's angles where cos and sin are.

    Args:
        kv_latent: [T, dc]; float32, bfloat16 or float16 (float64 is served by the reference).
        k_rope: [T, dr], in kv_latent's dtype.
        kv_cache: [num_blocks, block_size, dc + dr], or with a 1 before the last axis, in
            kv_latent's dtype; any strides. Or rows of bytes, as `mla_decode` has them, beside
            bfloat16: the latent is then quantised to float8_e4m3fn, each 128 channels with a scale
            that is their largest magnitude / 448.
        slot_mapping: int64 [T], block * block_size + place of each token; -1 skips it. Slots
            that occur twice get one of their rows. A slot outside the cache raises on CPU and is
            skipped on GPU.
        norm_weight: [dc], in kv_latent's dtype or float32.
        norm_eps: added to the mean square.
        cos, sin: [T, dr/2], or [T, dr] with both halves alike; kv_latent's dtype or float32.
        rope_interleaved: a pair is channels 2i and 2i + 1; else i and i + dr/2. Either stays in
            place.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    For inference: an input that requires grad, in grad mode, raises. Arithmetic is float32.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a wrong shape, dtype, device or value, named; nothing is then written.
        BackendUnavailableError: a forced backend that can't serve the call.
        RuntimeError: an input requires grad.

    Source: DeepSeek-AI, "DeepSeek-V2" (2024), equations 41 to 43; Zhang and Sennrich, "Root Mean
    Square Layer Normalization" (2019), equation 4; Su et al., "RoFormer" (2021), equation 34.
    """
    checks.tensor("kv_latent", kv_latent)
    checks.dtype("kv_latent", kv_latent, checks.REAL)
    checks.ndim("kv_latent", kv_latent, 2, "[T, dc]")
    T, dc = kv_latent.shape
    checks.tensor("k_rope", k_rope)
    checks.ndim("k_rope", k_rope, 2, "[T, dr]")
    dr = k_rope.shape[1]
    _check_beside("k_rope", k_rope, (T, dr), "[T, dr]", kv_latent, (kv_latent.dtype,))
    pages = arguments.pages(kv_cache, dc, dr, kv_latent, "kv_latent")
    checks.written("kv_cache", kv_cache)
    checks.tensor("slot_mapping", slot_mapping)
    checks.dtype("slot_mapping", slot_mapping, checks.INDEX)
    checks.shape("slot_mapping", slot_mapping, (T,), "[T]")
    checks.device("slot_mapping", slot_mapping, kv_latent.device, "kv_latent")
    arguments.norm_eps(norm_eps)
    checks.boolean("rope_interleaved", rope_interleaved)
    either = kv_latent.dtype, torch.float32
    if norm_weight is not None:
        checks.tensor("norm_weight", norm_weight)
        _check_beside("norm_weight", norm_weight, (dc,), "[dc]", kv_latent, either)
    _check_angles(cos, sin, T, dr, kv_latent, either)
    arguments.for_inference("mla_cache_append", kv_latent, k_rope, kv_cache, norm_weight, cos, sin)
    backend = dispatch.resolve(backend)
    if launchers.served_by_reference("mla_cache_append", kv_latent, backend):
        arguments.slots_in_reach(slot_mapping, pages)
        reference.mla_cache_append(
            kv_latent, k_rope, pages, slot_mapping,
            norm_weight=norm_weight, norm_eps=norm_eps, cos=cos, sin=sin,
            rope_interleaved=rope_interleaved,
        )  # fmt: skip
        return
    if cos is not None and sin is not None:  # both halves are alike
        cos, sin = cos[:, : dr // 2], sin[:, : dr // 2]
    operators.mla_cache_append(
        kv_latent, k_rope, pages, slot_mapping, norm_weight, float(norm_eps), cos, sin,
        rope_interleaved, backend,
    )  # fmt: skip


def _check_beside(
    name: str,
    value: Tensor,
    shape: tuple[int, ...],
    axes: str,
    kv_latent: Tensor,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    checks.dtype(name, value, dtypes)
    checks.shape(name, value, shape, axes)
    checks.device(name, value, kv_latent.device, "kv_latent")


def _check_angles(
    cos: Tensor | None,
    sin: Tensor | None,
    T: int,
    dr: int,
    kv_latent: Tensor,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        missing, given = ("cos", "sin") if cos is None else ("sin", "cos")
        raise ValueError(f"{missing}: expected a tensor beside {given}, got None")
    if dr % 2:
        raise ValueError(f"k_rope: expected an even dr to turn by cos and sin, got {dr}")
    for name, value in (("cos", cos), ("sin", sin)):
        checks.tensor(name, value)
        checks.ndim(name, value, 2, "[T, dr/2] or [T, dr]")
        width = dr if value.shape[1] == dr else dr // 2
        axes = "[T, dr]" if value.shape[1] == dr else "[T, dr/2]"
        _check_beside(name, value, (T, width), axes, kv_latent, dtypes)
    checks.shape("sin", sin, tuple(cos.shape), "[T, width of cos]")
