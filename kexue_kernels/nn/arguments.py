"""Checks that the modules' constructors and methods share."""

import torch
from torch import Tensor

from kexue_kernels import autocast, checks
from kexue_kernels.options import finite as finite
from kexue_kernels.options import integer
from kexue_kernels.options import number as number
from kexue_kernels.options import one_of as one_of

size = integer


def step_range(dt_min: float, dt_max: float) -> None:
    number("dt_min", dt_min)
    number("dt_max", dt_max)
    if not 0 < dt_min < float("inf"):
        raise ValueError(f"dt_min: expected a positive number, got {dt_min}")
    if not dt_min <= dt_max < float("inf"):
        raise ValueError(f"dt_max: expected a number from dt_min = {dt_min} on, got {dt_max}")


def parameter_dtype(dtype: object) -> None:
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {type(dtype).__name__}")
    if dtype is not None and dtype not in checks.REAL:
        raise ValueError(f"dtype: expected a real floating dtype, got {dtype}")


def data(x: object, dim: int, axes: str, own: Tensor) -> None:
    """x [.., dim] with as many axes as `axes` names, fit for a module with the parameter `own`."""
    checks.tensor("x", x)
    assert isinstance(x, Tensor)
    checks.ndim("x", x, axes.count(",") + 1, axes)
    checks.shape("x", x, (*x.shape[:-1], dim), axes)
    checks.device("x", x, own.device, "the module")
    may_differ = autocast.enabled(x.device.type) and own.dtype != torch.float64
    checks.dtype("x", x, checks.HALF_AND_SINGLE if may_differ else (own.dtype,))


def state_rows(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many states x [B, L, dim] has: one a row, or one a packed sequence."""
    if cu_seqlens is None:
        return x.shape[0]
    checks.cu_seqlens(cu_seqlens, x, "x")
    return cu_seqlens.shape[0] - 1


def state(
    value: object,
    expected: tuple[int, ...],
    axes: str,
    dtype: torch.dtype,
    own: Tensor,
    name: str = "state",
) -> None:
    checks.tensor(name, value)
    assert isinstance(value, Tensor)
    checks.dtype(name, value, (dtype,))
    checks.shape(name, value, expected, axes)
    checks.device(name, value, own.device, "the module")
