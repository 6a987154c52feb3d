"""monarch_matmul in PyTorch, by blocks of rows: where no compiled kernel serves.

A block of n rows is kept features first. Then what the first factor writes, z [k*q, n], read as
[r, l, n], is for each l a matrix that BLAS takes by its strides: no copy for the permutation.
"""

import torch
from torch import Tensor

from kexue_kernels.autocast import without_autocast
from kexue_kernels.checks import state_dtype
from kexue_kernels.monarch.row_blocks import (
    accumulate,
    as_blocks,
    conjugate,
    row_blocks,
    working_dtype,
    write_product,
)


@without_autocast
def forward(x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None) -> Tensor:
    (k, q, p), (l, s, _), dtype = w1.shape, w2.shape, working_dtype(x)
    w1, w2 = w1.to(dtype), w2.to(dtype)
    offset = None if bias is None else bias.to(dtype).view(s, l, 1).transpose(0, 1)  # l s 1
    y = x.new_empty(x.shape[0], s * l)
    for rows in row_blocks(x, k * p, k * q, s * l):
        z = _hidden(as_blocks(x[rows].to(dtype), k), w1)
        y_t = z.new_empty(s * l, z.shape[1])
        out = _by_second(y_t, l)
        if offset is None:
            torch.bmm(w2, _by_second(z, l), out=out)
        else:
            torch.baddbmm(offset.expand_as(out), w2, _by_second(z, l), out=out)
        y[rows] = y_t.T
    return y


@without_autocast
def backward(
    grad: Tensor, x: Tensor, w1: Tensor, w2: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    (k, q, p), (l, s, _), dtype = w1.shape, w2.shape, working_dtype(grad)
    want_x, want_w1, want_w2 = wanted
    w1, w1_conj, w2_adjoint = w1.to(dtype), conjugate(w1.to(dtype)), conjugate(w2.to(dtype)).mT
    wide = state_dtype(dtype)
    dx = grad.new_empty(grad.shape[0], k * p) if want_x else None
    dw1 = w1.new_zeros(w1.shape, dtype=wide) if want_w1 else None
    dw2 = w2.new_zeros(w2.shape, dtype=wide) if want_w2 else None
    for rows in row_blocks(grad, k * p, k * q, s * l):
        g = grad[rows].T.to(dtype, memory_format=torch.contiguous_format, copy=True)
        if want_w1 or want_w2:
            x_blocks = as_blocks(x[rows].to(dtype), k)
        if dw2 is not None:
            z_conj = conjugate(_hidden(x_blocks, w1))
            accumulate(dw2, _by_second(g, l), _by_second(z_conj, l).mT)
        if dx is None and dw1 is None:
            continue
        dz = g.new_empty(k * q, g.shape[1])
        torch.bmm(w2_adjoint, _by_second(g, l), out=_by_second(dz, l))
        dz_blocks = dz.view(k, q, -1)
        if dx is not None:
            write_product(dx[rows], dz_blocks.mT, w1_conj)
        if dw1 is not None:
            accumulate(dw1, dz_blocks, conjugate(x_blocks))
    data = grad.dtype
    return dx, None if dw1 is None else dw1.to(data), None if dw2 is None else dw2.to(data)


def _by_second(z: Tensor, l: int) -> Tensor:
    """[r*l, n], l fastest, as [l, r, n]."""
    return z.view(z.shape[0] // l, l, z.shape[1]).transpose(0, 1)


def _hidden(x_blocks: Tensor, w1: Tensor) -> Tensor:
    """z [k*q, n] of x [k, n, p]."""
    return torch.bmm(w1, x_blocks.mT).view(w1.shape[0] * w1.shape[1], x_blocks.shape[1])
