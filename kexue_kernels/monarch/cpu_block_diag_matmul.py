"""block_diag_matmul by the C++ extension on CPU: allocates, and passes addresses and strides."""

from typing import Any

import torch
from torch import Tensor

from kexue_kernels import _extension

_C: Any = _extension.load().module  # the operator asks whether there is one

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.complex64: 3}


def forward(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x [N, k*p], w [k, q, p], bias [k*q] -> [N, k*q]."""
    N = x.shape[0]
    y = x.new_empty(N, w.shape[0] * w.shape[1])
    _C.block_diag_matmul_forward(
        torch.get_num_threads(),
        CODES[x.dtype],
        N,
        tuple(w.shape),
        array(x),
        array(w),
        (0, 0) if bias is None else array(bias),
        y.data_ptr(),
    )
    return y


def backward(
    grad: Tensor, x: Tensor, w: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """grad [N, k*q] -> the gradients of x and w, contiguous, where they are wanted."""
    dx, dw = (empty_like(t) if want else None for t, want in zip((x, w), wanted, strict=True))
    _C.block_diag_matmul_backward(
        torch.get_num_threads(),
        CODES[x.dtype],
        x.shape[0],
        tuple(w.shape),
        array(grad),
        array(x),
        array(w),
        address(dx),
        address(dw),
    )
    return dx, dw


def array(x: Tensor) -> tuple[int, ...]:
    """Its address and strides."""
    return x.data_ptr(), *x.stride()


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
