"""mla_cache_append in PyTorch: where no compiled kernel serves."""

import torch
from torch import Tensor

from kexue_kernels.checks import state_dtype
from kexue_kernels.mla import fp8
from kexue_kernels.mla.rotary import rotated


def append(
    kv_latent: Tensor,
    k_rope: Tensor,
    pages: Tensor,
    slot_mapping: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    rope_interleaved: bool,
) -> None:
    dtype, block_size = state_dtype(kv_latent.dtype), pages.shape[1]
    latent, key = kv_latent, k_rope
    if norm_weight is not None:
        latent = torch.rms_norm(
            latent.to(dtype), latent.shape[-1:], norm_weight.to(dtype), norm_eps
        )
    if cos is not None and sin is not None:
        key = rotated(key.to(dtype), cos.to(dtype), sin.to(dtype), rope_interleaved)
    kept = (slot_mapping >= 0) & (slot_mapping < pages.shape[0] * block_size)
    slots = slot_mapping[kept]
    if pages.dtype == torch.uint8:
        rows = fp8.pack(latent, key)
    else:
        rows = torch.cat([latent.to(pages.dtype), key.to(pages.dtype)], -1)
    pages[slots // block_size, slots % block_size] = rows[kept]
