"""codebook_statistics by the C++ extension on CPU: allocates, and passes addresses."""

from typing import Any

import torch
from torch import Tensor

from kexue_kernels import _extension

_C: Any = _extension.load().module  # the operator asks whether there is one

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def statistics(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """counts int64 [K] and sums float32 [K, d], added in float64 in the rows' order."""
    N, d = x.shape
    counts = torch.empty(num_codes, dtype=torch.int64)
    sums = torch.zeros(num_codes, d, dtype=torch.float32)
    _C.codebook_statistics(
        torch.get_num_threads(),
        _CODES[x.dtype],
        N,
        num_codes,
        d,
        x.data_ptr(),
        indices.data_ptr(),
        counts.data_ptr(),
        sums.data_ptr(),
    )
    return counts, sums
