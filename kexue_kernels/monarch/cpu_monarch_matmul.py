"""monarch_matmul by the C++ extension on CPU: allocates, and passes addresses and strides."""

from typing import Any

import torch
from torch import Tensor

from kexue_kernels import _extension
from kexue_kernels.monarch.cpu_block_diag_matmul import CODES, address, array, empty_like

_C: Any = _extension.load().module  # the operator asks whether there is one


def forward(x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None) -> Tensor:
    """x [N, k*p], w1 [k, q, p], w2 [l, s, r], bias [s*l] -> [N, s*l]."""
    N = x.shape[0]
    y = x.new_empty(N, w2.shape[0] * w2.shape[1])
    _C.monarch_matmul_forward(
        torch.get_num_threads(),
        CODES[x.dtype],
        N,
        tuple(w1.shape),
        tuple(w2.shape),
        array(x),
        array(w1),
        array(w2),
        (0, 0) if bias is None else array(bias),
        y.data_ptr(),
    )
    return y


def backward(
    grad: Tensor, x: Tensor, w1: Tensor, w2: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """grad [N, s*l] -> the gradients of x, w1 and w2, contiguous, where they are wanted."""
    dx, dw1, dw2 = (
        empty_like(t) if want else None for t, want in zip((x, w1, w2), wanted, strict=True)
    )
    _C.monarch_matmul_backward(
        torch.get_num_threads(),
        CODES[x.dtype],
        x.shape[0],
        tuple(w1.shape),
        tuple(w2.shape),
        array(grad),
        array(x),
        array(w1),
        array(w2),
        address(dx),
        address(dw1),
        address(dw2),
    )
    return dx, dw1, dw2
