"""What the products in plain PyTorch share: blocks of rows, and the dtype they are computed in.

A block is small enough for what lies between two products to stay in the CPU's caches.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kexue_kernels.checks import state_dtype

_ELEMENTS = {"cpu": 1 << 17}  # of a block's widest matrix
_ANYWHERE_ELSE = 1 << 26
_FEWEST_ROWS = 128  # below, products are slow


def working_dtype(x: Tensor) -> torch.dtype:
    """On CPU float32 for halves, whose products PyTorch is slow at there."""
    return state_dtype(x.dtype) if x.device.type == "cpu" else x.dtype


def row_blocks(x: Tensor, *widths: int) -> Iterator[slice]:
    """Slices of x's rows, of matrices that are `widths` wide."""
    elements = _ELEMENTS.get(x.device.type, _ANYWHERE_ELSE)
    rows = max(_FEWEST_ROWS, elements // max(widths))
    for start in range(0, x.shape[0], rows):
        yield slice(start, start + rows)


def conjugate(x: Tensor) -> Tensor:
    """Not lazily: BLAS would copy anew for each product."""
    return x.conj().resolve_conj()


def as_blocks(x: Tensor, k: int) -> Tensor:
    """[n, k*p] as [k, n, p]."""
    return x.unflatten(1, (k, x.shape[1] // k)).transpose(0, 1)


def write_product(out: Tensor, a: Tensor, b: Tensor, offset: Tensor | None = None) -> None:
    """out [n, k*q] = a [k, n, p] @ b [k, p, q] + offset, at once where the dtype is the same."""
    blocks = as_blocks(out, a.shape[0])
    target = blocks if out.dtype == a.dtype else blocks.new_empty(blocks.shape, dtype=a.dtype)
    if offset is None:
        torch.bmm(a, b, out=target)
    else:
        torch.baddbmm(offset.expand_as(target), a, b, out=target)
    if target is not blocks:
        blocks.copy_(target)


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, batched, total in float32 or complex64."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a, b)
