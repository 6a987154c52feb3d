"""The mla family in plain PyTorch, absorbed: a head's query meets the latent itself.

A row of the cache is a token's latent beside its rotated key, dc + dr wide. It is the key of every
head, and its first head_dim_v columns are the value. Sizes: B sequences of Tq queries, H heads.
Rows may also be bytes, as in fp8.py. `mla_attention` alone makes keys and values of a head.
"""

import torch
from torch import Tensor

from kexue_kernels.autocast import without_autocast
from kexue_kernels.checks import cu_seqlens_values, state_dtype
from kexue_kernels.mla import fp8
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
    B, Tq, H, _ = q.shape
    dtype = state_dtype(q.dtype)
    out = q.new_zeros(B, Tq, H, head_dim_v)
    lse = q.new_zeros(B, H, Tq, dtype=dtype)
    pages = fp8.as_bytes(kv_cache.squeeze(2) if kv_cache.ndim == 4 else kv_cache)
    for b, length in enumerate(cache_seqlens.tolist()):
        rows = cached_rows(pages, block_table[b], length)
        rows = fp8.numbers(rows, head_dim_v, dtype)  # [length, dc + dr]
        scores = softmax_scale * torch.einsum("thd,nd->htn", q[b].to(dtype), rows)
        if causal:
            scores = scores.masked_fill(~visible(Tq, length, q.device), -torch.inf)
        lse[b] = scores.logsumexp(-1)
        weights = (scores - lse[b].nan_to_num(neginf=0.0)[..., None]).exp()  # none: exp(-inf)
        out[b] = torch.einsum("htn,nv->thv", weights, rows[:, :head_dim_v]).to(q.dtype)
    return (out, lse) if return_lse else out


def cached_rows(pages: Tensor, table: Tensor, length: int) -> Tensor:
    """[length, ...] of a sequence, whose pages are pages[table[0]], pages[table[1]], ..."""
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
    lse_a, lse_b = (x.masked_fill(x == torch.inf, -torch.inf) for x in (lse_a, lse_b))
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
    pages = fp8.as_bytes(kv_cache.squeeze(2) if kv_cache.ndim == 4 else kv_cache)
    if pages.dtype == torch.uint8:
        rows = fp8.pack(latent, key)
    else:
        rows = torch.cat([latent, key], -1).to(pages.dtype)
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
    is_fp8_kvcache: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """FlashMLA's call of `mla_decode`. See `kexue_kernels.flash_mla_with_kvcache`."""
    del tile_scheduler_metadata, num_splits, is_fp8_kvcache
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    found = mla_decode(
        q, k_cache, block_table, cache_seqlens,
        head_dim_v=head_dim_v, softmax_scale=scale, causal=causal, return_lse=True,
    )  # fmt: skip
    assert isinstance(found, tuple)
    out, lse = found
    return out, torch.where(lse > -torch.inf, lse, torch.inf)


@without_autocast
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
) -> Tensor:
    """Softmax attention, its keys and values from latents. See `kexue_kernels.mla_attention`."""
    dtype = state_dtype(q_nope.dtype)
    latent = kv_latent.to(dtype)
    k = torch.einsum("btc,hkc->bhtk", latent, w_uk.to(dtype))
    v = torch.einsum("btc,hvc->bhtv", latent, w_uv.to(dtype))
    k_rope = k_rope.to(dtype)[:, None].expand(-1, k.shape[1], -1, -1)
    q = torch.cat([q_nope, q_rope], -1).to(dtype)
    scale = max(q.shape[-1], 1) ** -0.5 if softmax_scale is None else softmax_scale
    scores = scale * torch.einsum("bthd,bhnd->bhtn", q, torch.cat([k, k_rope], -1))
    hidden = ~attended(q.shape[1], causal, cu_seqlens, q.device)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("bhtn,bhnv->bthv", weights, v).to(q_nope.dtype)


def attended(T: int, causal: bool, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """Which tokens each token sees, [T, T]: those of its sequence, and none after it if causal."""
    token = torch.arange(T, device=device)
    seen = torch.ones(T, T, dtype=torch.bool, device=device)
    if causal:
        seen = token <= token[:, None]
    if cu_seqlens is not None:
        bounds = torch.tensor(cu_seqlens_values(cu_seqlens, T), device=device)
        sequence = torch.searchsorted(bounds, token, right=True)
        seen = seen & (sequence == sequence[:, None])
    return seen
