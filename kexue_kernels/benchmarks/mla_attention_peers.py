"""Who attends from latents: this package's backends, and PyTorch over expanded keys and values.

All take the six inputs of `kk.mla_attention`, causal, with its default scale.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import kexue_kernels as kk
from kexue_kernels.benchmarks.case import Contestant

EAGER = "eager attention, expanded"
COMPILED = "torch.compile of the reference"
REFERENCE = "torch, by head and block"
BLOCK = 2048  # queries of the reference's blocks

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def ours(backend: str) -> Contestant:
    status = kk.backends()[backend]
    return Contestant(
        f"kexue {backend}",
        lambda: partial(kk.mla_attention, backend=backend),
        ours=True,
        unfit="" if status.available else status.reason,
    )


def reference() -> Contestant:
    """In any precision, at any length."""
    return Contestant(REFERENCE, lambda: by_head)


def eager() -> Contestant:
    """The arithmetic of Transformers' eager attention in DeepSeek-V3, after the projections."""
    return Contestant(EAGER, lambda: in_full)


def compiled() -> Contestant:
    return Contestant(COMPILED, lambda: torch.compile(kk.reference.mla_attention), slow=True)


def sdpa_name(backend: str) -> str:
    return f"expand + SDPA {backend}"


def sdpa(backend: str) -> Contestant:
    """Sums in an order of its own, which may miss the gate by a hair."""
    attend = partial(by_sdpa, backend=backend)
    return Contestant(sdpa_name(backend), lambda: attend, approximate=True)


def sdpa_backends(device: torch.device) -> tuple[str, ...]:
    """Those that attend without all scores at once; of CPUs' there is one."""
    return tuple(SDPA) if device.type == "cuda" else ("flash",)


def expanded(
    q_nope: Tensor, q_rope: Tensor, kv_latent: Tensor, k_rope: Tensor, w_uk: Tensor, w_uv: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k [B, H, T, dk + dr] and v [B, H, T, dv] of all heads."""
    B, T, H, dk = q_nope.shape
    weight = torch.cat([w_uk, w_uv], 1).flatten(0, 1)  # as a checkpoint has it
    kv = F.linear(kv_latent, weight).view(B, T, H, -1).transpose(1, 2)
    k_nope, v = kv.split([dk, w_uv.shape[1]], -1)
    k = torch.cat([k_nope, k_rope[:, None].expand(-1, H, -1, -1)], -1)
    return torch.cat([q_nope, q_rope], -1).transpose(1, 2), k, v


def in_full(*data: Tensor) -> Tensor:
    q, k, v = expanded(*data)
    T, width = q.shape[2:]
    mask = q.new_full((T, T), torch.finfo(q.dtype).min).triu_(1)
    scores = q @ k.mT * width**-0.5 + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2).contiguous()


def by_sdpa(*data: Tensor, backend: str) -> Tensor:
    q, k, v = expanded(*data)
    dv, width = v.shape[3], q.shape[3]
    if backend == "flash":  # takes one width for all
        v = F.pad(v, (0, width - dv))
    with sdpa_kernel(SDPA[backend]):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out[..., :dv].transpose(1, 2).contiguous()


def by_head(
    q_nope: Tensor, q_rope: Tensor, kv_latent: Tensor, k_rope: Tensor, w_uk: Tensor, w_uv: Tensor
) -> Tensor:
    """A head at a time, made again in the backward. Sums over heads and blocks: float32 or better.

    No product is wider than the inputs' dtype, so in that it errs as plain PyTorch does.
    """
    dtype = q_nope.dtype
    wide = torch.promote_types(dtype, torch.float32)
    latent, key = kv_latent.to(wide), k_rope.to(wide)
    heads = [
        _again(_head, q_nope[:, :, h], q_rope[:, :, h], latent, key, w_uk[h], w_uv[h])
        for h in range(q_nope.shape[2])
    ]
    return torch.stack(heads, 2)


def _head(
    q_nope: Tensor, q_rope: Tensor, latent: Tensor, key: Tensor, w_uk: Tensor, w_uv: Tensor
) -> Tensor:
    """[B, T, dv] of q_nope [B, T, dk]."""
    dtype, wide = q_nope.dtype, latent.dtype
    latent, key = latent.to(dtype), key.to(dtype)
    k = torch.cat([latent @ w_uk.mT, key], -1).to(wide)
    v = (latent @ w_uv.mT).to(wide)
    q = torch.cat([q_nope, q_rope], -1)
    blocks = [
        _again(_rows, rows, k[:, : start + rows.shape[1]], v[:, : start + rows.shape[1]])
        for start, rows in zip(range(0, q.shape[1], BLOCK), q.split(BLOCK, 1), strict=True)
    ]
    return torch.cat(blocks, 1)


def _rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last of the tokens, [B, rows, dv] of q [B, rows, dk + dr]."""
    wide, (rows, width), tokens = k.dtype, q.shape[1:], k.shape[1]
    scores = q @ k.to(q.dtype).mT * width**-0.5
    later = torch.ones(rows, tokens, dtype=torch.bool, device=q.device).triu_(1 + tokens - rows)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1, dtype=wide).to(q.dtype)
    return weights @ v.to(q.dtype)


def _again(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Computed again in the backward rather than kept."""
    found = checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(found, Tensor)
    return found
