"""What a Mamba mixer does in the C++ extension on CPU: passes addresses and strides."""

from typing import Any

import torch
from torch import Tensor

from kexue_kernels import _extension

_C: Any = _extension.load().module  # the caller asks whether there is one

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

Projection = tuple[Tensor, Tensor | None]


def step(
    x: Tensor,
    window: Tensor,
    state: Tensor,
    projections: tuple[Projection, ...],
    parameters: tuple[Tensor | None, ...],
    rms_eps: float | None,
    out: Tensor,
) -> None:
    """`projections` in, x, dt and out; `parameters` taps, conv_bias, A, D and dt_bias."""
    wide = x.float().contiguous()
    in_proj, x_proj, dt_proj, out_proj = (
        (weight.data_ptr(), _address(bias)) for weight, bias in projections
    )
    (batch, d, n), (taps, conv_bias, A, D, dt_bias) = state.shape, parameters
    assert taps is not None
    rank = projections[2][0].shape[1]
    _C.mamba_step(
        torch.get_num_threads(),
        _CODES[x.dtype],
        (batch, x.shape[1], d, n, rank, taps.shape[0], window.shape[1]),
        wide.data_ptr(),
        (window.data_ptr(), *window.stride()),
        (state.data_ptr(), _CODES[state.dtype], *state.stride()),
        in_proj,
        x_proj,
        dt_proj,
        out_proj,
        taps.data_ptr(),
        _address(conv_bias),
        _address(A),
        _address(D),
        _address(dt_bias),
        rms_eps is not None,
        rms_eps or 0.0,
        out.data_ptr(),
    )


def convolve(
    x: Tensor, window: Tensor | None, taps: Tensor, bias: Tensor | None, silu: bool, y: Tensor
) -> None:
    x = _dense(x)
    window = None if window is None else _dense(window)
    _C.causal_conv(
        torch.get_num_threads(),
        _CODES[x.dtype],
        (*x.shape, taps.shape[0]),
        silu,
        (x.data_ptr(), *x.stride()),
        (0, 0, 0, 0) if window is None else (window.data_ptr(), *window.stride()),
        taps.data_ptr(),
        _address(bias),
        y.data_ptr(),
    )


def _dense(x: Tensor) -> Tensor:
    """With neighbouring channels."""
    return x if x.stride(2) == 1 else x.contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
