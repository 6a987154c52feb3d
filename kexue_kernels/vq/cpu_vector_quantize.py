"""vector_quantize by the C++ extension on CPU: allocates, and passes addresses."""

from typing import Any

import torch
from torch import Tensor

from kexue_kernels import _extension

_C: Any = _extension.load().module  # the operator asks whether there is one

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_GRADIENTS = {"ste": 0, "rotation": 1}


def forward(x: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's code [N, d], NaN without one, and the mean of (x - q)^2 over the others."""
    quantized = torch.empty_like(x)
    loss = _C.vector_quantize_forward(
        torch.get_num_threads(),
        _CODES[x.dtype],
        x.shape[0],
        *codebook.shape,
        x.data_ptr(),
        codebook.data_ptr(),
        indices.data_ptr(),
        quantized.data_ptr(),
    )
    return quantized, torch.tensor(loss, dtype=torch.float32)


def backward(
    grad_quantized: Tensor,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    gradient: str,
    scale_x: Tensor,
    scale_c: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """grad_x [N, d], and grad_codebook [K, d], which has no elements without a scale_c."""
    grad_x = torch.empty_like(x)
    grad_codebook = codebook.new_empty(0) if scale_c is None else torch.zeros_like(codebook)
    _C.vector_quantize_backward(
        torch.get_num_threads(),
        _CODES[x.dtype],
        x.shape[0],
        *codebook.shape,
        (grad_quantized.data_ptr(), *grad_quantized.stride()),
        x.data_ptr(),
        codebook.data_ptr(),
        indices.data_ptr(),
        _GRADIENTS[gradient],
        scale_x.item(),
        0.0 if scale_c is None else scale_c.item(),
        grad_x.data_ptr(),
        grad_codebook.data_ptr(),  # 0 where it has no elements
    )
    return grad_x, grad_codebook
