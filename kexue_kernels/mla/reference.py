"""The mla family in plain PyTorch, absorbed: a head's query meets the latent itself.

A row of the cache is a token's latent beside its rotated key, dc + dr wide. It is the key of every
head, and its first head_dim_v columns are the value. Sizes: B sequences of Tq queries, H heads.
"""

import torch
from torch import Tensor

from kexue_kernels.autocast import without_autocast
from kexue_kernels.checks import state_dtype
from kexue_kernels.mla.rotary import rotated


@without_autocast
def mla_decode(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    head_dim_v: int,
    softmax_scale: float,
    causal: bool = True,
    num_splits: int | None = None,  # how a kernel shares the work
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over each sequence's cached rows. See `kexue_kernels.mla_decode`."""
    del num_splits
    B, Tq, H, width = q.shape
    dtype = state_dtype(q.dtype)
    out = q.new_zeros(B, Tq, H, head_dim_v)
    lse = q.new_zeros(B, H, Tq, dtype=dtype)
    pages = kv_cache.reshape(*kv_cache.shape[:2], width)
    for b, length in enumerate(cache_seqlens.tolist()):
        rows = cached_rows(pages, block_table[b], length).to(dtype)  # [length, dc + dr]
        scores = softmax_scale * torch.einsum("thd,nd->htn", q[b].to(dtype), rows)
        if causal:
            scores = scores.masked_fill(~visible(Tq, length, q.device), -torch.inf)
        lse[b] = scores.logsumexp(-1)
        weights = (scores - lse[b].nan_to_num(neginf=0.0)[..., None]).exp()  # none: exp(-inf)
        out[b] = torch.einsum("htn,nv->thv", weights, rows[:, :head_dim_v]).to(q.dtype)
    return (out, lse) if return_lse else out


def cached_rows(pages: Tensor, table: Tensor, length: int) -> Tensor:
    """[length, dc + dr] of a sequence, whose pages are pages[table[0]], pages[table[1]], ..."""
    used = -(-length // pages.shape[1])
    return pages[table[:used].long()].flatten(0, 1)[:length]


def visible(Tq: int, length: int, device: torch.device) -> Tensor:
    """Which keys each query sees, [Tq, length]: the last query is the last token."""
    query = torch.arange(length - Tq, length, device=device)
    return torch.arange(length, device=device) <= query[:, None]


def merge_attention_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys. See `kexue_kernels.merge_attention_states`."""
    top = torch.maximum(lse_a, lse_b).detach()
    top = torch.where(top > -torch.inf, top, 0.0)
    weight_a, weight_b = (lse_a - top).exp(), (lse_b - top).exp()  # [B, H, T]
    total = weight_a + weight_b
    seen = total > 0
    safe = torch.where(seen, total, 1.0)
    lse = torch.where(seen, safe.log() + top, -torch.inf)
    share_a, share_b = (
        (weight / safe).transpose(1, 2)[..., None] for weight in (weight_a, weight_b)
    )
    out = share_a * out_a + share_b * out_b
    return out.to(out_a.dtype), lse


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
) -> None:
    """Write tokens' rows at their slots, in place. See `kexue_kernels.mla_cache_append`."""
    dtype = state_dtype(kv_latent.dtype)
    latent, key = kv_latent.to(dtype), k_rope.to(dtype)
    if norm_weight is not None:
        mean_square = latent.square().mean(-1, keepdim=True)
        latent = latent * (mean_square + norm_eps).rsqrt() * norm_weight.to(dtype)
    if cos is not None and sin is not None:
        key = rotated(key, cos.to(dtype), sin.to(dtype), rope_interleaved)
    rows = torch.cat([latent, key], -1).to(kv_cache.dtype)
    pages = kv_cache.squeeze(2) if kv_cache.ndim == 4 else kv_cache
    num_blocks, block_size = pages.shape[:2]
    kept = (slot_mapping >= 0) & (slot_mapping < num_blocks * block_size)
    slots = slot_mapping[kept].long()
    pages[slots // block_size, slots % block_size] = rows[kept]


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: object = None,
    num_splits: object = None,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """FlashMLA's call of `mla_decode`. See `kexue_kernels.flash_mla_with_kvcache`."""
    del tile_scheduler_metadata, num_splits
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    found = mla_decode(
        q, k_cache, block_table, cache_seqlens,
        head_dim_v=head_dim_v, softmax_scale=scale, causal=causal, return_lse=True,
    )  # fmt: skip
    assert isinstance(found, tuple)
    out, lse = found
    return out, torch.where(lse > -torch.inf, lse, torch.inf)
