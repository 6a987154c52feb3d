"""block_diag_matmul in PyTorch: batched products that read and write rows by their strides."""

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
def forward(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    (k, q, p), dtype = w.shape, working_dtype(x)
    w_t = w.to(dtype).mT
    offset = None if bias is None else bias.to(dtype).view(k, 1, q)
    y = x.new_empty(x.shape[0], k * q)
    for rows in row_blocks(x, k * p, k * q):
        write_product(y[rows], as_blocks(x[rows].to(dtype), k), w_t, offset)
    return y


@without_autocast
def backward(
    grad: Tensor, x: Tensor, w: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    (k, q, p), dtype = w.shape, working_dtype(grad)
    want_x, want_w = wanted
    w_conj = conjugate(w.to(dtype))
    dx = grad.new_empty(grad.shape[0], k * p) if want_x else None
    dw = w.new_zeros(w.shape, dtype=state_dtype(dtype)) if want_w else None
    for rows in row_blocks(grad, k * p, k * q):
        g = as_blocks(grad[rows].to(dtype), k)
        if dx is not None:
            write_product(dx[rows], g, w_conj)
        if dw is not None:
            accumulate(dw, g.mT, conjugate(as_blocks(x[rows].to(dtype), k)))
    return dx, None if dw is None else dw.to(grad.dtype)
