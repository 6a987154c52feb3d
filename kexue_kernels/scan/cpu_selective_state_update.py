"""selective_state_update by the C++ extension on CPU: passes addresses and strides."""

from typing import Any

import torch
from torch import Tensor

from kexue_kernels import _extension

_C: Any = _extension.load().module  # the operator asks whether there is one

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NONE = (0,)


def update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state_batch_indices: Tensor | None,
    out: Tensor,
) -> None:
    batch, H, P = x.shape
    _C.selective_state_update(
        torch.get_num_threads(),
        _CODES[state.dtype],
        _CODES[x.dtype],
        (batch, H, P, A.shape[2], B.shape[1]),
        dt_softplus,
        0 if state_batch_indices is None else state_batch_indices.data_ptr(),
        out.data_ptr(),
        (state.data_ptr(), *state.stride()),
        (x.data_ptr(), *x.stride()),
        (dt.data_ptr(), *dt.stride()),
        (A.data_ptr(), *A.stride()),
        (B.data_ptr(), *B.stride()),
        (C.data_ptr(), *C.stride()),
        _NONE if D is None else (D.data_ptr(), *D.stride()),
        _NONE if z is None else (z.data_ptr(), *z.stride()),
        _NONE if dt_bias is None else (dt_bias.data_ptr(), *dt_bias.stride()),
    )
