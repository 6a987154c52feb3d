"""linear_scan by the C++ extension on CPU: allocates, and passes addresses and strides."""

from typing import Any

import torch
from torch import Tensor

from kexue_kernels import _extension
from kexue_kernels.checks import state_dtype

_C: Any = _extension.load().module  # the operator asks whether there is one

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.complex64: 3}
_NO_GRAD_A, _AS_DATA, _AS_STATE, _SUMS = range(4)  # GradA in csrc/scan/linear_scan_cpu.h
_NO_STRIDES = (0, 0, 0)


def forward(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    B, L, D = shape = b.shape
    rows = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = b.dtype
    h = torch.empty_like(b, memory_format=torch.contiguous_format)  # quicker than torch.empty
    final_state = torch.empty(rows, D, dtype=state_dtype(dtype)) if return_final_state else None
    _C.linear_scan_forward(
        _CODES[dtype],
        torch.get_num_threads(),
        B,
        L,
        D,
        rows,
        0 if cu_seqlens is None else cu_seqlens.data_ptr(),
        reverse,
        a.data_ptr(),
        _broadcast_strides(a, shape),
        b.data_ptr(),
        b.stride(),
        h.data_ptr(),
        0 if initial_state is None else initial_state.data_ptr(),
        0 if final_state is None else final_state.data_ptr(),
    )
    return h, final_state


def backward(
    a: Tensor,
    h: Tensor | None,
    initial_state: Tensor | None,
    grad_h: Tensor,
    grad_final: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """grad_a is [B, L, D], or, where a is time-invariant, float32 sums [B, any, D]."""
    B, L, D = shape = grad_h.shape
    dtype = grad_h.dtype
    rows = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    grad_b = torch.empty_like(grad_h, memory_format=torch.contiguous_format)
    grad_initial = None
    if initial_state is not None:
        grad_initial = torch.empty(rows, D, dtype=state_dtype(dtype))
    kind, grad_a = _grad_a(a, h, grad_h, rows if cu_seqlens is not None else 1)
    _C.linear_scan_backward(
        _CODES[dtype],
        torch.get_num_threads(),
        B,
        L,
        D,
        rows,
        0 if cu_seqlens is None else cu_seqlens.data_ptr(),
        reverse,
        a.data_ptr(),
        _broadcast_strides(a, shape),
        0 if h is None else h.data_ptr(),
        _NO_STRIDES if h is None else h.stride(),
        grad_h.data_ptr(),
        grad_h.stride(),
        0 if initial_state is None else initial_state.data_ptr(),
        0 if grad_final is None else grad_final.data_ptr(),
        grad_b.data_ptr(),
        kind,
        0 if grad_a is None else grad_a.data_ptr(),
        0 if grad_initial is None else grad_initial.data_ptr(),
    )
    return grad_a, grad_b, grad_initial


def _broadcast_strides(a: Tensor, shape: torch.Size) -> tuple[int, ...]:
    """Those of a.expand(shape)."""
    strides = a.stride()
    if a.shape == shape:
        return strides
    return tuple(0 if size == 1 else stride for size, stride in zip(a.shape, strides, strict=True))


def _grad_a(
    a: Tensor, h: Tensor | None, grad_h: Tensor, sequences: int
) -> tuple[int, Tensor | None]:
    """Its kind and where it goes: what is still to be summed is in the state's dtype."""
    B, L, D = shape = grad_h.shape
    if h is None:
        return _NO_GRAD_A, None
    if a.shape[1] == 1:
        rows = L // _C.linear_scan_tile_steps + sequences
        return _SUMS, torch.zeros((B, rows, D), dtype=state_dtype(a.dtype))
    if a.shape == shape:
        return _AS_DATA, torch.empty(shape, dtype=a.dtype)
    return _AS_STATE, torch.empty(shape, dtype=state_dtype(a.dtype))
