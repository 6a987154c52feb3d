"""nearest_codebook by the C++ extension on CPU: allocates, and passes addresses and strides."""

from typing import Any

import torch
from torch import Tensor

from kexue_kernels import _extension

_C: Any = _extension.load().module  # the operator asks whether there is one

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_METRICS = {"l2": 0, "cosine": 1, "dot": 2}


def search(x: Tensor, codebook: Tensor, metric: str, precision: str) -> Tensor:
    """x [H, N, d], codebook [H, K, d] -> int64 [H, N]."""
    H, N, d = x.shape
    indices = torch.empty(H, N, dtype=torch.int64)
    _C.nearest_codebook(
        torch.get_num_threads(),
        _CODES[x.dtype],
        _METRICS[metric],
        precision == "exact",
        H,
        N,
        codebook.shape[1],
        d,
        (x.data_ptr(), *x.stride()),
        (codebook.data_ptr(), *codebook.stride()),
        indices.data_ptr(),
    )
    return indices
