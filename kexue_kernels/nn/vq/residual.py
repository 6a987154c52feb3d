"""Residual vector quantisation: each quantiser takes what the ones before it left over."""

from typing import Any

import torch
from torch import Tensor, nn

from kexue_kernels.checks import state_dtype
from kexue_kernels.nn import arguments
from kexue_kernels.nn.vq.indices import check as check_indices
from kexue_kernels.nn.vq.vector_quantizer import VectorQuantizer
from kexue_kernels.vq.reference import Replace, estimate

__all__ = ["ResidualVQ"]


class ResidualVQ(nn.Module):
    """Quantises x as a sum of codes, one of each of `num_quantizers` codebooks.

    The gradient of the sum reaches x once, straight through or by the rotation that takes x to
    the sum; every quantiser adds its loss.

    Args:
        dim, codebook_size: of each quantiser.
        num_quantizers: how many there are.
        options: keywords of `VectorQuantizer`, the same for all.

    Submodules: `layers`, the quantisers, which tell their own `perplexity` and `usage`.

    Source: Zeghidour et al., "SoundStream" (2021), algorithm 1.
    """

    def __init__(self, dim: int, codebook_size: int, num_quantizers: int, **options: Any) -> None:
        super().__init__()
        arguments.size("num_quantizers", num_quantizers)
        self.layers = nn.ModuleList(
            VectorQuantizer(dim, codebook_size, **options) for _ in range(num_quantizers)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(quantized [..., dim], indices int64 [..., num_quantizers], loss) of x [..., dim].

        With heads the indices are [..., heads, num_quantizers]. The loss is the sum of all.
        """
        residual, parts, chosen, losses = x, [], [], []
        for layer in self.layers:
            quantized, indices, loss = layer(residual)
            residual = residual - quantized.detach()
            parts.append(quantized.detach())
            chosen.append(indices)
            losses.append(loss)
        total = torch.stack(parts).sum(0)
        return self._with_gradient(x, total), torch.stack(chosen, -1), torch.stack(losses).sum()

    def _with_gradient(self, x: Tensor, total: Tensor) -> Tensor:
        """The sum of codes; its gradient goes to x, none to rows without a code."""
        valid = total.isfinite().all(-1, keepdim=True)
        wide = state_dtype(x.dtype)
        kept, q = (torch.where(valid, t, 0).to(wide) for t in (x, total))
        first = self.layers[0]
        assert isinstance(first, VectorQuantizer)
        quantized = Replace.apply(estimate(kept, q, first.gradient), total)
        return torch.where(valid, quantized, torch.nan)

    def decode(self, indices: Tensor) -> Tensor:
        """[..., dim] of indices as `forward` gives them; NaN where one is -1.

        Any other index that is no code's raises on CPU.
        """
        first = self.layers[0]
        assert isinstance(first, VectorQuantizer)
        check_indices(indices, first.codebook_size, (len(self.layers),))
        parts = [layer.decode(indices[..., i]) for i, layer in enumerate(self.layers)]  # type: ignore[operator]
        return torch.stack(parts).sum(0)
