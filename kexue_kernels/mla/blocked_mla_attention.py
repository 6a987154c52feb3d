"""mla_attention in PyTorch, a tile of scores at a time: where no compiled kernel serves.

A tile is BLOCK queries of a group of heads against KEYS keys.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kexue_kernels.mla import expanded
from kexue_kernels.mla.expanded import LN2, Heads, Sequences

BLOCK = 128
KEYS = 1024
BUDGET = 8 * 2**20  # bytes of a group's keys and values in float32: a share of a cache


def forward(*call: Any) -> tuple[Tensor, Tensor]:
    return expanded.forward(Blocked, BUDGET, *call)


def backward(*call: Any) -> tuple[Tensor | None, ...]:
    return expanded.backward(Blocked, BUDGET, *call)


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


class Blocked(Heads):
    def expand(self, w: Tensor, factor: float) -> Tensor:
        found = self.latent @ w.flatten(0, 1).T
        return (found if factor == 1 else found.mul_(factor)).unflatten(1, w.shape[:2])

    def attend(self, q_nope: Tensor, q_rope: Tensor, out: Tensor, lse: Tensor) -> None:
        for block in blocks(self.sequences):
            at = block.queries
            o, lse2 = self._attend(_queries(q_nope[at], q_rope[at]), block)
            out[at] = o.transpose(0, 1)
            torch.mul(lse2, LN2, out=lse[:, at])

    def differentiate(
        self,
        grad: Tensor,
        q_nope: Tensor,
        q_rope: Tensor,
        out: Tensor,
        lse: Tensor,
        d_nope: Tensor,
        d_rope: Tensor,
        d_key: Tensor,
    ) -> tuple[Tensor, Tensor]:
        dk, dv = torch.zeros_like(self.k), torch.zeros_like(self.v)
        for block in blocks(self.sequences):
            at = block.queries
            q = _queries(q_nope[at], q_rope[at])
            g = grad[at].float()
            D = (g * out[at]).sum(-1).T  # [G, M]
            dq = self._differentiate(
                q, block, g.transpose(0, 1), D, lse[:, at] / LN2, dk, dv, d_key
            )
            d_nope[at] = dq.nope.transpose(0, 1)
            d_rope[at] = dq.rope.unflatten(0, D.shape).transpose(0, 1)
        return dk, dv

    def add_product(self, to: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
        to.addmm_(a, b, alpha=factor)

    def _attend(self, q: Queries, block: Block) -> tuple[Tensor, Tensor]:
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

    def _differentiate(
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

    @cached_property
    def _scratch(self) -> Tensor:
        T, G, _ = self.k.shape
        return self.k.new_empty(2, G * min(BLOCK, T) * min(KEYS, T))

    def _tile(self, which: int, shape: Sequence[int]) -> Tensor:
        return self._scratch[which, : math.prod(shape)].view(*shape)


def blocks(sequences: Sequences) -> list[Block]:
    """All queries of all sequences."""
    return [
        Block(start, min(start + BLOCK, last), first, last, sequences.causal)
        for first, last in pairwise(sequences.bounds)
        for start in range(first, last, BLOCK)
    ]


def _queries(nope: Tensor, rope: Tensor) -> Queries:
    """Of [M, G, dk] and [M, G, dr]."""
    return Queries(_by_head(nope.float()), _by_head(rope.float()).flatten(0, 1))


def _by_head(x: Tensor) -> Tensor:
    """[tokens, G, d] as [G, tokens, d]."""
    return x.transpose(0, 1)
