"""Finite scalar quantisation as a module."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kexue_kernels import checks
from kexue_kernels.nn import arguments
from kexue_kernels.nn.vq.indices import check as check_indices
from kexue_kernels.vq.scalar import checked_levels, fsq

__all__ = ["FSQ"]


class FSQ(nn.Module):
    """Rounds each channel to one of a few levels: a codebook that is never learned or stored.

    Args:
        levels: how many values each channel takes, at least 2 each.
        dim: channels of input and output, where they are not len(levels): two linear layers,
            `project_in` and `project_out`, go between.
        preserve_symmetry: the bound of Parker et al. in place of Mentzer et al.'s.
        device, dtype: of the linear layers.

    Source: as `kexue_kernels.fsq`.
    """

    def __init__(
        self,
        levels: Sequence[int],
        *,
        dim: int | None = None,
        preserve_symmetry: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.levels = checked_levels(levels)
        checks.boolean("preserve_symmetry", preserve_symmetry)
        arguments.parameter_dtype(dtype)
        n = len(self.levels)
        self.dim = n if dim is None else dim
        arguments.size("dim", self.dim)
        self.preserve_symmetry = preserve_symmetry
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.dim != n:
            self.project_in = nn.Linear(self.dim, n, device=device, dtype=dtype)
            self.project_out = nn.Linear(n, self.dim, device=device, dtype=dtype)

    @property
    def codebook_size(self) -> int:
        """How many indices there are."""
        return math.prod(self.levels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(quantized [..., dim], indices int64 [...], 0) of x [..., dim]: nothing to be learned."""
        checks.tensor("x", x)
        if x.ndim < 1 or x.shape[-1] != self.dim:
            raise ValueError(f"x: expected shape [..., {self.dim}], got {list(x.shape)}")
        z = self.project_in(x)
        quantized, indices = fsq(z, self.levels, preserve_symmetry=self.preserve_symmetry)
        loss = z.new_zeros((), dtype=checks.state_dtype(z.dtype))
        return self.project_out(quantized), indices, loss

    def decode(self, indices: Tensor) -> Tensor:
        """[..., dim] of indices [...]; NaN where one is -1.

        Any other index outside 0 .. codebook_size - 1 raises on CPU.
        """
        check_indices(indices, self.codebook_size)
        L = torch.tensor(self.levels, device=indices.device)
        basis = torch.cat([L.new_ones(1), L[:-1].cumprod(0)])
        places = indices.long()[..., None] // basis % L
        if self.preserve_symmetry:
            values = places * (2 / (L - 1)) - 1
        else:
            values = (places - L // 2) / (L // 2)
        values = values.masked_fill(indices[..., None] < 0, torch.nan)
        own = next(self.parameters(), None)
        return self.project_out(values if own is None else values.to(own.dtype))

    def extra_repr(self) -> str:
        """The levels, and the bound if it is the other one."""
        return f"{self.levels}" + ", preserve_symmetry=True" * self.preserve_symmetry
