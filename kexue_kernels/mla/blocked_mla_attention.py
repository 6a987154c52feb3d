"""mla_attention in PyTorch, a tile of scores at a time: where no compiled kernel serves.

A tile is BLOCK queries of a group of heads against KEYS keys. Scores are kept in base 2: keys are
multiplied by softmax_scale / ln 2, and exp2 takes half the time of exp.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from kexue_kernels.autocast import without_autocast
from kexue_kernels.mla.groups import heads_per_group

BLOCK = 128
KEYS = 1024
BUDGET = 8 * 2**20  # bytes of a group's keys and values in float32: a share of a cache
LN2 = math.log(2)


class Block(NamedTuple):
    """Queries [start, end), which see keys from `first` on, up to their own or to `last`."""

    start: int
    end: int
    first: int
    last: int
    causal: bool

    @property
    def queries(self) -> slice:
        return slice(self.start, self.end)

    def tiles(self) -> Iterator[slice]:
        stop = self.end if self.causal else self.last
        return (slice(at, min(at + KEYS, stop)) for at in range(self.first, stop, KEYS))


class Queries(NamedTuple):
    """M queries of G heads, float32."""

    nope: Tensor  # [G, M, dk]
    rope: Tensor  # [G * M, dr]


@without_autocast
def forward(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    softmax_scale: float,
    causal: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q_nope.shape
    out = q_nope.new_empty(B, T, H, w_uv.shape[1])
    lse = q_nope.new_empty((B, H, T), dtype=torch.float32)
    for b, heads in _parts(q_nope, w_uv):
        group = Group(kv_latent[b], k_rope[b], w_uk[heads], w_uv[heads], softmax_scale)
        for block in blocks(T, causal, cu_seqlens):
            at = b, block.queries, heads
            o, lse2 = group.attend(_queries(q_nope[at], q_rope[at]), block)
            out[at] = o.transpose(0, 1)
            torch.mul(lse2, LN2, out=lse[b, heads, block.queries])
        del group  # before the next one's memory is taken
    return out, lse


@without_autocast
def backward(
    grad: Tensor,
    q_nope: Tensor,
    q_rope: Tensor,
    kv_latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    causal: bool,
    cu_seqlens: Tensor | None,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    T = q_nope.shape[1]
    d_nope, d_rope = (x.new_empty(x.shape) for x in (q_nope, q_rope))
    given = kv_latent, k_rope, w_uk, w_uv
    sums = [x.new_zeros(x.shape, dtype=torch.float32) for x in given]
    d_latent, d_key, d_uk, d_uv = sums
    latent_wanted, _, *weights_wanted = wanted[2:]
    for b, heads in _parts(q_nope, w_uv):
        group = Group(kv_latent[b], k_rope[b], w_uk[heads], w_uv[heads], softmax_scale)
        dk, dv = torch.zeros_like(group.k), torch.zeros_like(group.v)  # [T, G, d]
        for block in blocks(T, causal, cu_seqlens):
            at = b, block.queries, heads
            q = _queries(q_nope[at], q_rope[at])
            g = grad[at].float()
            D = (g * out[at]).sum(-1).T  # [G, M]
            lse2 = lse[b, heads, block.queries] / LN2
            dq = group.differentiate(q, block, g.transpose(0, 1), D, lse2, dk, dv, d_key[b])
            d_nope[at] = dq.nope.transpose(0, 1)
            d_rope[at] = dq.rope.unflatten(0, D.shape).transpose(0, 1)
        dk *= softmax_scale
        if latent_wanted:
            group.add_to_latent(d_latent[b], dk, dv)
        for d_w, d, wants in zip((d_uk, d_uv), (dk, dv), weights_wanted, strict=True):
            if wants:
                group.add_to_weight(d_w[heads], d)
        del group, dk, dv, d  # before the next ones' memory is taken
    d_key *= softmax_scale
    found = d_nope, d_rope, *(g.to(x.dtype) for g, x in zip(sums, given, strict=True))
    return tuple(g if want else None for g, want in zip(found, wanted, strict=True))


class Group:
    """The keys and values of G heads over T tokens, float32; keys times softmax_scale / ln 2."""

    def __init__(
        self, latent: Tensor, key: Tensor, w_uk: Tensor, w_uv: Tensor, softmax_scale: float
    ) -> None:
        self.latent = latent.float()  # [T, dc]
        self.w_uk, self.w_uv = w_uk.float().flatten(0, 1), w_uv.float().flatten(0, 1)
        heads, T = w_uk.shape[:2], latent.shape[0]
        self.k = (self.latent @ self.w_uk.T).mul_(softmax_scale / LN2).unflatten(1, heads)
        self.v = (self.latent @ self.w_uv.T).unflatten(1, w_uv.shape[:2])  # [T, G, dv]
        self.key = key.float() * (softmax_scale / LN2)  # [T, dr]
        self._scratch = latent.new_empty(
            (2, heads[0] * min(BLOCK, T) * min(KEYS, T)), dtype=torch.float32
        )

    def attend(self, q: Queries, block: Block) -> tuple[Tensor, Tensor]:
        """out [G, M, dv] and lse [G, M] in base 2."""
        G, M, _ = q.nope.shape
        top = q.nope.new_full((G, M), -torch.inf)
        total, out = torch.zeros_like(top), q.nope.new_zeros(G, M, self.v.shape[2])
        for keys in block.tiles():
            scores = self._scores(q, block, keys)
            new_top = torch.maximum(top, scores.amax(-1))
            weights = scores.sub_(new_top[..., None]).exp2_()
            kept = (top - new_top).exp2_()
            total = total * kept + weights.sum(-1)
            out.mul_(kept[..., None]).baddbmm_(weights, _by_head(self.v[keys]))
            top = new_top
        return out.div_(total[..., None]), total.log2_() + top

    def differentiate(
        self,
        q: Queries,
        block: Block,
        g: Tensor,
        D: Tensor,
        lse2: Tensor,
        dk: Tensor,
        dv: Tensor,
        d_key: Tensor,
    ) -> Queries:
        """dq, of g [G, M, dv], D and lse2 [G, M]. Adds to dk, dv [T, G, d] and to d_key [T, dr].

        dk and d_key lack the factor softmax_scale.
        """
        dq = Queries(torch.zeros_like(q.nope), torch.zeros_like(q.rope))
        for keys in block.tiles():
            P = self._scores(q, block, keys).sub_(lse2[..., None]).exp2_()
            _by_head(dv[keys]).baddbmm_(P.mT, g)
            dS = torch.bmm(g, _by_head(self.v[keys]).mT, out=self._tile(1, P.shape))
            dS.sub_(D[..., None]).mul_(P)
            dq.nope.baddbmm_(dS, _by_head(self.k[keys]))
            _by_head(dk[keys]).baddbmm_(dS.mT, q.nope)
            rows = dS.flatten(0, 1)  # all heads share the key
            dq.rope.addmm_(rows, self.key[keys])
            d_key[keys].addmm_(rows.T, q.rope)
        return Queries(*(x.mul_(LN2) for x in dq))

    def add_to_latent(self, d_latent: Tensor, dk: Tensor, dv: Tensor) -> None:
        """[T, dc], of the gradients [T, G, d] of keys and values."""
        d_latent.addmm_(dk.flatten(1, 2), self.w_uk).addmm_(dv.flatten(1, 2), self.w_uv)

    def add_to_weight(self, d_w: Tensor, d: Tensor) -> None:
        """[G, d, dc], of the gradient [T, G, d] of what it makes of the latent."""
        d_w.flatten(0, 1).addmm_(d.flatten(1, 2).T, self.latent)

    def _scores(self, q: Queries, block: Block, keys: slice) -> Tensor:
        """[G, M, keys], in base 2; minus infinity where the key comes after the query."""
        G, M, _ = q.nope.shape
        scores = self._tile(0, (G, M, keys.stop - keys.start))
        torch.bmm(q.nope, _by_head(self.k[keys]).mT, out=scores)
        scores.flatten(0, 1).addmm_(q.rope, self.key[keys].T)
        seen = block.start + 1 - keys.start  # keys that all of the queries see
        if block.causal and seen < scores.shape[2]:
            later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.nope.device)
            later = later.triu_(seen)[:, max(seen, 0) :]
            scores[..., max(seen, 0) :].masked_fill_(later, -torch.inf)
        return scores

    def _tile(self, which: int, shape: Sequence[int]) -> Tensor:
        return self._scratch[which, : math.prod(shape)].view(*shape)


def blocks(T: int, causal: bool, cu_seqlens: Tensor | None) -> list[Block]:
    """All queries of all sequences."""
    bounds: Sequence[int] = (0, T) if cu_seqlens is None else cu_seqlens.tolist()
    return [
        Block(start, min(start + BLOCK, last), first, last, causal)
        for first, last in pairwise(bounds)
        for start in range(first, last, BLOCK)
    ]


def _parts(q_nope: Tensor, w_uv: Tensor) -> Iterator[tuple[int, slice]]:
    """Which of the batch, and which heads."""
    B, T, H, dk = q_nope.shape
    size = heads_per_group(T, H, dk, w_uv.shape[1], 4, BUDGET)
    starts = range(0, H, size)
    return ((b, slice(start, min(start + size, H))) for b in range(B) for start in starts)


def _queries(nope: Tensor, rope: Tensor) -> Queries:
    """Of [M, G, dk] and [M, G, dr]."""
    return Queries(_by_head(nope.float()), _by_head(rope.float()).flatten(0, 1))


def _by_head(x: Tensor) -> Tensor:
    """[tokens, G, d] as [G, tokens, d]."""
    return x.transpose(0, 1)
