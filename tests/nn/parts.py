"""What the tests of the modules share."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def gradients(out: Iterable[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Of a fixed random projection of the outputs."""
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for y in out:
        real = torch.view_as_real(y) if y.is_complex() else y
        weight = torch.randn(real.shape, generator=generator, dtype=torch.float64)
        total = total + (real.double() * weight).sum()
    return list(torch.autograd.grad(total, inputs))


def check_as_near(ours: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """At most twice as far from `exact` as plain PyTorch in the same dtype, or some roundings."""
    for o, p, e in zip(ours, plain, exact, strict=True):
        assert o.dtype == p.dtype
        unit = torch.finfo(o.dtype).eps
        allowed = 2 * (p - e).abs().max() + 10 * unit * e.abs().max()
        assert (o - e).abs().max() <= allowed
