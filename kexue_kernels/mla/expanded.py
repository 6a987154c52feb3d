"""mla_attention on CPU: a few heads at a time have their keys and values, in float32.

What a group of heads does, a launcher's `Heads` says; the order of groups, and what comes in and
goes out, is here. Scores are kept in base 2: keys are multiplied by softmax_scale / ln 2.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kexue_kernels.autocast import without_autocast
from kexue_kernels.mla.groups import heads_per_group

LN2 = math.log(2)


class Sequences(NamedTuple):
    bounds: list[int]  # sequence n has tokens [bounds[n], bounds[n + 1])
    causal: bool


class Heads(ABC):
    """The keys and values of G heads over T tokens, float32, and what is made of them."""

    def __init__(
        self,
        latent: Tensor,
        key: Tensor,
        w_uk: Tensor,
        w_uv: Tensor,
        softmax_scale: float,
        sequences: Sequences,
    ) -> None:
        self.latent = latent.float()  # [T, dc]
        self.w_uk, self.w_uv = w_uk.float(), w_uv.float()  # [G, d, dc]
        self.softmax_scale = softmax_scale
        self.sequences = sequences
        self.k = self.expand(self.w_uk, softmax_scale / LN2)  # [T, G, dk]
        self.v = self.expand(self.w_uv, 1.0)  # [T, G, dv]
        self.key = (key.float() * (softmax_scale / LN2)).contiguous()  # [T, dr]

    @abstractmethod
    def expand(self, w: Tensor, factor: float) -> Tensor:
        """[T, G, d]: factor times the latent by w [G, d, dc]."""

    @abstractmethod
    def attend(self, q_nope: Tensor, q_rope: Tensor, out: Tensor, lse: Tensor) -> None:
        """Write out [T, G, dv] and lse [G, T], natural, of queries [T, G, d]."""

    @abstractmethod
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
        """Write d_nope and d_rope [T, G, d], add to d_key [T, dr]; dk and dv [T, G, d].

        dk and d_key lack the factor softmax_scale.
        """

    @abstractmethod
    def add_product(self, to: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
        """to += factor a b, of float32 matrices."""

    def add_to_latent(self, d_latent: Tensor, dk: Tensor, dv: Tensor) -> None:
        """[T, dc], of the gradients of keys and values."""
        self.add_product(d_latent, _flat(dk), self.w_uk.flatten(0, 1), self.softmax_scale)
        self.add_product(d_latent, _flat(dv), self.w_uv.flatten(0, 1), 1.0)

    def add_to_weight(self, d_w: Tensor, d: Tensor, factor: float) -> None:
        """[G, d, dc], of the gradient [T, G, d] of what it makes of the latent."""
        self.add_product(d_w.flatten(0, 1), _flat(d).T, self.latent, factor)


@without_autocast
def forward(
    heads_of: type[Heads],
    budget: int,
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
    """A launcher's. `budget`: bytes of a group's keys and values."""
    B, T, H, _ = q_nope.shape
    out = q_nope.new_empty(B, T, H, w_uv.shape[1])
    lse = q_nope.new_empty((B, H, T), dtype=torch.float32)
    sequences = _sequences(T, causal, cu_seqlens)
    for b, heads in _parts(q_nope, w_uv, budget):
        weights = w_uk[heads], w_uv[heads]
        group = heads_of(kv_latent[b], k_rope[b], *weights, softmax_scale, sequences)
        at = b, slice(None), heads
        group.attend(q_nope[at], q_rope[at], out[at], lse[b, heads])
        del group  # before the next one's memory is taken
    return out, lse


@without_autocast
def backward(
    heads_of: type[Heads],
    budget: int,
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
    d_nope, d_rope = (x.new_empty(x.shape) for x in (q_nope, q_rope))
    given = kv_latent, k_rope, w_uk, w_uv
    sums = [x.new_zeros(x.shape, dtype=torch.float32) for x in given]
    d_latent, d_key, d_uk, d_uv = sums
    latent_wanted, _, uk_wanted, uv_wanted = wanted[2:]
    sequences = _sequences(q_nope.shape[1], causal, cu_seqlens)
    for b, heads in _parts(q_nope, w_uv, budget):
        weights = w_uk[heads], w_uv[heads]
        group = heads_of(kv_latent[b], k_rope[b], *weights, softmax_scale, sequences)
        at = b, slice(None), heads
        queries = grad[at], q_nope[at], q_rope[at], out[at], lse[b, heads]
        dk, dv = group.differentiate(*queries, d_nope[at], d_rope[at], d_key[b])
        if latent_wanted:
            group.add_to_latent(d_latent[b], dk, dv)
        if uk_wanted:
            group.add_to_weight(d_uk[heads], dk, softmax_scale)
        if uv_wanted:
            group.add_to_weight(d_uv[heads], dv, 1.0)
        del group, dk, dv  # before the next ones' memory is taken
    d_key *= softmax_scale
    found = d_nope, d_rope, *(g.to(x.dtype) for g, x in zip(sums, given, strict=True))
    return tuple(g if want else None for g, want in zip(found, wanted, strict=True))


def _sequences(T: int, causal: bool, cu_seqlens: Tensor | None) -> Sequences:
    return Sequences([0, T] if cu_seqlens is None else cu_seqlens.tolist(), causal)


def _parts(q_nope: Tensor, w_uv: Tensor, budget: int) -> Iterator[tuple[int, slice]]:
    """Which of the batch, and which heads."""
    B, T, H, dk = q_nope.shape
    size = heads_per_group(T, H, dk, w_uv.shape[1], 4, budget)
    starts = range(0, H, size)
    return ((b, slice(start, min(start + size, H))) for b in range(B) for start in starts)


def _flat(x: Tensor) -> Tensor:
    """[T, G, d] as [T, G * d]."""
    return x.flatten(1, 2)
