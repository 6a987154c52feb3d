"""selective_scan by the C++ extension on CPU: allocates, and passes addresses and strides."""

from typing import Any

import torch
from torch import Tensor

from kexue_kernels import _extension
from kexue_kernels.scan.chunks import SelectiveGradients, SelectiveInputs, chunk_length

_C: Any = _extension.load().module  # the operator asks whether there is one

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NONE = (0, 0, 0, 0)


def forward(
    inputs: SelectiveInputs,
    out: Tensor,
    final_state: Tensor | None,
    checkpoints: Tensor | None,
) -> None:
    _C.selective_scan_forward(
        torch.get_num_threads(),
        _given(inputs),
        out.data_ptr(),
        _address(final_state),
        _address(checkpoints),
    )


def backward(
    grad_out: Tensor,
    grad_final: Tensor | None,
    inputs: SelectiveInputs,
    checkpoints: Tensor,
) -> SelectiveGradients:
    grads = SelectiveGradients(
        *(_room(x) for x in inputs[:5]),
        *(None if x is None else _room(x) for x in inputs[5:9]),
    )
    _C.selective_scan_backward(
        torch.get_num_threads(),
        _given(inputs),
        _array(grad_out),
        _address(grad_final),
        checkpoints.data_ptr(),
        tuple(_address(grad) for grad in grads),
    )
    return grads


def _room(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _given(inputs: SelectiveInputs) -> tuple[Any, ...]:
    """As inputs_of in csrc/scan/selective_scan_bindings.cpp takes them apart."""
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus = inputs
    batch, L, d = u.shape
    n = A.shape[1]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        (batch, L, d, n, sequences, _address(cu_seqlens), chunk_length(n)),
        _CODES[u.dtype],
        A.is_complex(),
        delta_softplus,
        _array(u),
        _array(delta),
        _NONE if z is None else _array(z),
        A.data_ptr(),
        _projection(B),
        _projection(C),
        _address(D),
        _address(delta_bias),
        _address(initial_state),
    )


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _array(x: Tensor) -> tuple[int, ...]:
    return (x.data_ptr(), *x.stride())


def _projection(x: Tensor) -> tuple[int, ...]:
    """With its groups and strides where it is per step."""
    return (x.data_ptr(), x.shape[2], *x.stride()) if x.ndim == 4 else (x.data_ptr(),)
