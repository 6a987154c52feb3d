"""A character model whose blocks attend by any of four kinds of attention."""

from typing import NamedTuple

import torch
from char_lm_model import VOCABULARY
from torch import Tensor, nn
from torch.nn import functional as F

import kexue_kernels as kk

DIM, HEADS, LAYERS = 128, 8, 4
HEAD = DIM // HEADS
KINDS = {"MHA": HEADS, "GQA": 2, "MQA": 1}  # heads of keys and values
LATENT, ROTATED = 4 * HEAD, HEAD  # of MLA; DeepSeek-V2 turns half a head, which is 8 channels here


class GroupedAttention(nn.Module):
    """Causal attention of HEADS query heads over `groups` heads of keys and values."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.qkv = nn.Linear(DIM, (HEADS + 2 * groups) * HEAD, bias=False)
        self.out = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, DIM] -> [B, T, DIM]"""
        heads = self.qkv(x).unflatten(-1, (-1, HEAD)).transpose(1, 2)
        q, k, v = heads.split([HEADS, self.groups, self.groups], dim=1)
        y = F.scaled_dot_product_attention(
            rotated(q), rotated(k), v, is_causal=True, enable_gqa=True
        )
        return self.out(y.transpose(1, 2).flatten(2))

    def cached(self) -> int:
        """Numbers that a token leaves in the cache."""
        return 2 * self.groups * HEAD


class LatentAttention(kk.nn.MultiheadLatentAttention):
    """The same by latents: what it caches does not grow with the heads."""

    def __init__(self) -> None:
        super().__init__(
            DIM,
            HEADS,
            q_lora_rank=None,
            kv_lora_rank=LATENT,
            qk_nope_head_dim=HEAD,
            qk_rope_head_dim=ROTATED,
            v_head_dim=HEAD,
        )

    def cached(self) -> int:
        return LATENT + ROTATED


def rotated(x: Tensor, base: float = 10000.0) -> Tensor:
    """RoPE of x [B, H, T, HEAD]: channels i and i + HEAD/2 turn by t base^(-2i/HEAD)."""
    half = x.shape[-1] // 2
    speeds = base ** -torch.linspace(0, 1, half + 1, device=x.device)[:-1]
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * speeds
    a, b = x.split(half, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(DIM) for _ in range(2))
        self.attention = LatentAttention() if kind == "MLA" else GroupedAttention(KINDS[kind])
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Tensor, *cache: object) -> Tensor:
        x = x + self.attention(self.norms[0](x), *cache)
        return x + self.mlp(self.norms[1](x))


class CharAttention(nn.Module):
    """Predicts each next character of a window from those before it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, DIM)
        self.blocks = nn.ModuleList(Block(kind) for _ in range(LAYERS))
        self.norm = nn.RMSNorm(DIM)
        self.head = nn.Linear(DIM, VOCABULARY)

    def forward(self, tokens: Tensor, caches: "Caches | None" = None) -> Tensor:
        """Logits [B, T, VOCABULARY] for tokens [B, T], after what the caches hold."""
        x = self.embed(tokens)
        for number, block in enumerate(self.blocks):
            x = block(x) if caches is None else block(x, caches.of_layer(number))
        return self.head(self.norm(x))

    def cached(self) -> int:
        """Numbers that a token leaves in the caches of all layers."""
        return sum(block.attention.cached() for block in self.blocks)


class Caches(NamedTuple):
    """A paged latent cache for each layer of an MLA model, and the sequence's id in each."""

    layers: list[kk.nn.PagedLatentCache]
    ids: list[int]

    @classmethod
    def for_tokens(cls, tokens: int, page: int = 16) -> "Caches":
        pages = -(-tokens // page)
        layers = [kk.nn.PagedLatentCache(pages, page, LATENT, ROTATED) for _ in range(LAYERS)]
        return cls(layers, [cache.allocate() for cache in layers])

    def of_layer(self, number: int) -> object:
        return self.layers[number].select([self.ids[number]])
