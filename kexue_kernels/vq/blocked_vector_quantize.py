"""vector_quantize in PyTorch, by blocks of rows: where no compiled kernel serves."""

import torch
from torch import Tensor

from kexue_kernels.vq import reference
from kexue_kernels.vq.blocked_codebook_statistics import segmented

_ROWS = 1 << 14


def forward(x: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    quantized = torch.empty_like(x)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for x_b, indices_b, out in zip(*(t.split(_ROWS) for t in (x, indices, quantized)), strict=True):
        valid = (indices_b >= 0)[:, None]
        q = codebook[indices_b.clamp(min=0)]
        out.copy_(torch.where(valid, q, torch.nan))
        total += torch.where(valid, x_b.float() - q.float(), 0).square().sum(dtype=torch.float64)
    return quantized, (total / _terms(x, indices)).float()


def backward(
    grad_quantized: Tensor,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    gradient: str,
    scale_x: Tensor,
    scale_c: Tensor | None,
) -> tuple[Tensor, Tensor]:
    terms = _terms(x, indices)
    grad_x = torch.empty_like(x)
    scale = (2 * scale_x.double() / terms).float()
    parts = (t.split(_ROWS) for t in (grad_quantized, x, indices, grad_x))
    for g, x_b, indices_b, out in zip(*parts, strict=True):
        q = codebook[indices_b.clamp(min=0)].float()
        passed = _passed(g.float(), x_b.float(), q, gradient)
        total = passed + (scale * (x_b.double() - q)).float()  # the difference may overflow
        out.copy_(torch.where((indices_b >= 0)[:, None], total, 0))
    if scale_c is None:
        return grad_x, codebook.new_empty(0)

    def residual(rows: Tensor) -> Tensor:
        return codebook[indices[rows]].float() - x[rows].float()

    _, sums = segmented(residual, indices, *codebook.shape)
    return grad_x, (2 * scale_c.double() / terms * sums).to(codebook.dtype)


def _passed(g: Tensor, x: Tensor, q: Tensor, gradient: str) -> Tensor:
    """What of the gradient g of q reaches x, all [N, d]."""
    if gradient == "ste":
        return g
    u, p, w, s, is_short = reference.rotation(x, q)
    turned = g - 2 * w * (w * g).sum(1, keepdim=True) + 2 * u * (p * g).sum(1, keepdim=True)
    return torch.where(is_short, g, s * turned)


def _terms(x: Tensor, indices: Tensor) -> Tensor:
    """How many elements the losses are the mean of; 1 where there is none."""
    return ((indices >= 0).sum() * x.shape[1]).clamp(min=1)
