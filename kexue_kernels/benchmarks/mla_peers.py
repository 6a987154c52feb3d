"""Who decodes with latent attention: this package's backends, and plain PyTorch in several ways.

All take the arguments of `attend` or of `step`; pages are full, and every sequence is as long as
its row of the table reaches.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import kexue_kernels as kk
from kexue_kernels.benchmarks.case import Contestant

ABSORBED = "torch bmm, absorbed"
SDPA = "torch SDPA, gathered"
COMPILED = "torch.compile of the bmm"
EXPANDED = "keys and values expanded"

DC = 512  # of the latent
SCALE = (128 + 64) ** -0.5
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def attend(
    q: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, *, backend: str
) -> Tensor:
    """q [B, Tq, H, dc + dr] -> [B, Tq, H, dc]."""
    out = kk.mla_decode(
        q, kv_cache, block_table, cache_seqlens,
        head_dim_v=DC, softmax_scale=SCALE, backend=backend,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def step(
    attend: Attend,
    q_nope: Tensor,
    q_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
) -> Tensor:
    """q_nope [B, Tq, H, dk] and q_rope [B, Tq, H, dr] -> [B, Tq, H, dv], projections absorbed."""
    q = torch.cat([torch.einsum("bthk,hkc->bthc", q_nope, w_uk), q_rope], -1)
    out = attend(q, kv_cache, block_table, cache_seqlens)
    return torch.einsum("bthc,hvc->bthv", out, w_uv)


def ours(backend: str, whole_step: bool) -> Contestant:
    status = kk.backends()[backend]
    own = partial(attend, backend=backend)
    return Contestant(
        f"kexue {backend}",
        lambda: partial(step, own) if whole_step else own,
        ours=True,
        unfit="" if status.available else status.reason,
    )


def reference(whole_step: bool) -> Contestant:
    own = partial(attend, backend="reference")
    return Contestant("torch, by sequence", lambda: partial(step, own) if whole_step else own)


def absorbed(whole_step: bool) -> Contestant:
    return Contestant(ABSORBED, lambda: partial(step, by_bmm) if whole_step else by_bmm)


def sdpa() -> Contestant:
    return Contestant(SDPA, lambda: by_sdpa)


def compiled() -> Contestant:
    return Contestant(COMPILED, lambda: torch.compile(by_bmm), slow=True)


def expanded() -> Contestant:
    """As Transformers' eager attention does: the keys and values of all heads at every step."""
    return Contestant(EXPANDED, lambda: by_expansion)


def gathered(kv_cache: Tensor, block_table: Tensor) -> Tensor:
    """[B, L, dc + dr]."""
    return kv_cache[block_table].flatten(1, 2)


def unseen(Tq: int, L: int, like: Tensor) -> Tensor:
    """[Tq, L]: keys that come after each of the last Tq tokens."""
    return torch.ones(Tq, L, dtype=torch.bool, device=like.device).triu(L - Tq + 1)


def by_bmm(q: Tensor, kv_cache: Tensor, block_table: Tensor, _: Tensor) -> Tensor:
    rows = gathered(kv_cache, block_table)
    B, Tq, H, width = q.shape
    scores = torch.bmm(q.reshape(B, Tq * H, width), rows.mT).view(B, Tq, H, -1) * SCALE
    if Tq > 1:
        scores = scores.masked_fill(unseen(Tq, rows.shape[1], q)[:, None], -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(weights.flatten(1, 2), rows[..., :DC]).view(B, Tq, H, DC)


def by_sdpa(q: Tensor, kv_cache: Tensor, block_table: Tensor, _: Tensor) -> Tensor:
    rows = gathered(kv_cache, block_table)[:, None].expand(-1, q.shape[2], -1, -1)
    mask = ~unseen(q.shape[1], rows.shape[2], q)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), rows, rows[..., :DC], attn_mask=mask, scale=SCALE
    )
    return out.transpose(1, 2)


def by_expansion(
    q_nope: Tensor,
    q_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
) -> Tensor:
    del cache_seqlens
    rows = gathered(kv_cache, block_table)
    latent, key = rows[..., :DC], rows[:, None, :, DC:].expand(-1, q_rope.shape[2], -1, -1)
    k = torch.cat([torch.einsum("bnc,hkc->bhnk", latent, w_uk), key], -1)
    v = torch.einsum("bnc,hvc->bhnv", latent, w_uv)
    q = torch.cat([q_nope, q_rope], -1).transpose(1, 2)
    scores = q @ k.mT * SCALE
    scores = scores.masked_fill(unseen(q.shape[2], k.shape[2], q), -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2)
