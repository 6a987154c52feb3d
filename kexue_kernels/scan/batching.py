"""torch.vmap over scan operators: the mapped axis joins the batch, or D where rows are packed."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fold:
    """V calls as one. Dense: [V, B, L, D] -> [V B, L, D]; packed: [V, 1, L, D] -> [1, L, V D]."""

    V: int
    packed: bool

    def data(self, x: Tensor | None, dim: int | None) -> Tensor | None:
        """b [B, L, D], or a state [B or N, D], with its mapped axis at `dim`."""
        if x is None:
            return None
        x = self._front(x, dim)
        return x.movedim(0, -2).flatten(-2) if self.packed else x.flatten(0, 1)

    def decay(self, a: Tensor, dim: int | None, B: int, D: int) -> Tensor:
        """`a`, of any shape that broadcasts to [B, L, D], one of its own for each of the V."""
        a = self._front(a, dim)
        a = a.reshape(self.V, *(1,) * (4 - a.ndim), *a.shape[1:])
        if self.packed:
            return a.expand(-1, -1, -1, D).movedim(0, -2).flatten(-2)
        return a.expand(-1, B, -1, -1).flatten(0, 1)

    def undo(self, x: Tensor) -> Tensor:
        """[V, ...] of what `data` folded."""
        if self.packed:
            return x.unflatten(-1, (self.V, x.shape[-1] // self.V)).movedim(-2, 0)
        return x.unflatten(0, (self.V, x.shape[0] // self.V))

    def undo_decay(self, grad: Tensor, shape: torch.Size) -> Tensor:
        """[V, *shape] of the gradient of what `decay` folded."""
        grad = self.undo(grad)
        full = (1,) * (3 - len(shape)) + tuple(shape)
        return grad.sum_to_size(self.V, *full).reshape(self.V, *shape)

    def _front(self, x: Tensor, dim: int | None) -> Tensor:
        return x.expand(self.V, *x.shape) if dim is None else x.movedim(dim, 0)


def fold_of(batch_size: int, cu_seqlens: Tensor | None, cu_seqlens_dim: int | None) -> Fold:
    if cu_seqlens_dim is not None:
        raise ValueError("cu_seqlens: can't be mapped over by vmap, expected one for all")
    return Fold(batch_size, packed=cu_seqlens is not None)


def logical_shape(x: Tensor, dim: int | None) -> torch.Size:
    """The shape that the mapped function sees."""
    return x.shape if dim is None else x.movedim(dim, 0).shape[1:]
