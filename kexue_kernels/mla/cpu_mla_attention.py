"""mla_attention by the C++ extension on CPU: allocates, and passes addresses and strides."""

from typing import Any

import torch
from torch import Tensor

from kexue_kernels import _extension
from kexue_kernels.mla import expanded
from kexue_kernels.mla.cpu_mla_decode import CODES
from kexue_kernels.mla.expanded import Heads

_C: Any = _extension.load().module  # the operator asks whether there is one

BUDGET = 8 * 2**20  # bytes of a group's keys and values: a share of a cache
LINE = 16  # floats


def forward(*call: Any) -> tuple[Tensor, Tensor]:
    return expanded.forward(Native, BUDGET, *call)


def backward(*call: Any) -> tuple[Tensor | None, ...]:
    return expanded.backward(Native, BUDGET, *call)


class Native(Heads):
    def expand(self, w: Tensor, factor: float) -> Tensor:
        (T, dc), (G, d, _) = self.latent.shape, w.shape
        found = _spread(G, T, d)
        _multiply(found, self.latent.expand(G, T, dc), w.mT, factor, add=False)
        return found.transpose(0, 1)

    def attend(self, q_nope: Tensor, q_rope: Tensor, out: Tensor, lse: Tensor) -> None:
        _C.mla_attention(*self._call(q_nope, q_rope, out, lse))

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
        dk, dv = (
            _spread(x.shape[0], x.shape[1] * x.shape[2]).unflatten(1, x.shape[1:])
            for x in (self.k, self.v)
        )
        each = q_rope.new_empty(q_rope.shape, dtype=torch.float32)  # d_key, by head
        _C.mla_attention_backward(
            *self._call(q_nope, q_rope, out, lse),
            tuple(map(_array, (grad, d_nope, d_rope))),
            tuple(map(_floats, (dk, each, dv))),
        )
        d_key += each.sum(1)
        return dk, dv

    def add_product(self, to: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
        _multiply(to[None], a[None], b[None], factor, add=True)

    def _call(self, q_nope: Tensor, q_rope: Tensor, out: Tensor, lse: Tensor) -> tuple[Any, ...]:
        T, G, dk = self.k.shape
        return (
            torch.get_num_threads(),
            CODES[q_nope.dtype],
            (T, G, dk, q_rope.shape[2], self.v.shape[2]),
            self.sequences.causal,
            self.sequences.bounds,
            tuple(map(_array, (q_nope, q_rope, out))),
            tuple(map(_floats, (self.k, self.key[:, None], self.v))),
            lse.data_ptr(),
        )


def _multiply(to: Tensor, a: Tensor, b: Tensor, factor: float, *, add: bool) -> None:
    """to [n, rows, columns] = factor a b; `add`: to what it has."""
    sizes = *a.shape[:2], b.shape[2], a.shape[2]
    _C.mla_matmul(torch.get_num_threads(), sizes, factor, _array(a), _array(b), _floats(to), add)


def _spread(*sizes: int) -> Tensor:
    """float32, its rows an odd number of cache lines apart: they meet in no few sets of a cache."""
    *others, width = sizes
    lines = -(-width // LINE) | 1
    return torch.empty(*others, lines * LINE)[..., :width]


def _array(x: Tensor) -> tuple[int, ...]:
    return x.data_ptr(), *x.stride()


def _floats(x: Tensor) -> tuple[int, int, int]:
    """Of an array whose last axis is contiguous."""
    return x.data_ptr(), x.stride(0), x.stride(1)
