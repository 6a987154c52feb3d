"""Argument checks for every op: an error names the argument, what was expected, what came."""

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd import forward_ad

HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
REAL = (*HALF_AND_SINGLE, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)
FLOATING = REAL + COMPLEX
DOUBLE = (torch.float64, torch.complex128)
INDEX = (torch.int32, torch.int64)

_STATE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def complex_dtype(dtype: torch.dtype) -> torch.dtype:
    """The complex dtype beside real data of `dtype`."""
    return torch.complex128 if dtype in DOUBLE else torch.complex64


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that accumulates and carries states for data of `dtype`."""
    return _STATE.get(dtype, dtype)


def tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested one" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")


def written(name: str, value: Tensor) -> None:
    """Of a tensor that is updated in place: no two elements are one number in memory."""
    if any(n > 1 and stride == 0 for n, stride in zip(value.shape, value.stride(), strict=True)):
        raise ValueError(
            f"{name}: expected memory of its own for each element, as it is written to, got shape "
            f"{list(value.shape)} with strides {list(value.stride())}"
        )


def recorded(*values: Tensor | None) -> bool:
    """Whether autograd follows one of them: for a backward pass, or forward by its tangent."""
    given = [x for x in values if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return True
    is_forward = forward_ad._current_level >= 0
    return is_forward and any(forward_ad.unpack_dual(x).tangent is not None for x in given)


def boolean(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def dtype(name: str, value: Tensor, allowed: Iterable[torch.dtype]) -> None:
    if value.dtype not in allowed:
        raise ValueError(f"{name}: expected dtype {_listed(allowed)}, got {_short(value.dtype)}")


def ndim(name: str, value: Tensor, expected: int, axes: str) -> None:
    if value.ndim != expected:
        raise ValueError(f"{name}: expected shape {axes}, got {list(value.shape)}")


def shape(name: str, value: Tensor, expected: tuple[int, ...], axes: str) -> None:
    if value.shape != expected:
        raise ValueError(
            f"{name}: expected shape {axes} = {list(expected)}, got {list(value.shape)}"
        )


def like(name: str, value: Tensor, other: Tensor, owner: str, axes: str) -> None:
    """The dtype, shape and device of `other`."""
    dtype(name, value, (other.dtype,))
    shape(name, value, tuple(other.shape), axes)
    device(name, value, other.device, owner)


def device(name: str, value: Tensor, expected: torch.device, owner: str) -> None:
    if value.device != expected:
        raise ValueError(f"{name}: expected device {expected} ({owner}'s), got {value.device}")


def broadcasts(name: str, value: Tensor, to: Tensor, owner: str) -> None:
    if value.shape == to.shape:
        return
    fits = value.ndim <= to.ndim and all(
        size == 1 or size == full
        for size, full in zip(reversed(value.shape), reversed(to.shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {owner}'s {list(to.shape)}, "
            f"got {list(value.shape)}"
        )


def cu_seqlens(value: object, data: Tensor, owner: str) -> None:
    """Kind, shape and device of packed boundaries; `cu_seqlens_values` checks the rest."""
    tensor("cu_seqlens", value)
    assert isinstance(value, Tensor)
    dtype("cu_seqlens", value, INDEX)
    if value.ndim != 1 or value.shape[0] == 0:
        raise ValueError(f"cu_seqlens: expected shape [N + 1], got {list(value.shape)}")
    device("cu_seqlens", value, data.device, owner)
    if data.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens: expected a batch of 1 in {owner} (sequences packed along L), "
            f"got a batch of {data.shape[0]}"
        )


def cu_seqlens_values(value: Tensor, length: int) -> list[int]:
    """The boundaries as a list, after checking them. Reads the values: for CPU tensors."""
    bounds: list[int] = value.tolist()
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens: expected the first value to be 0, got {bounds[0]}")
    for position, (start, end) in enumerate(pairwise(bounds)):
        if end < start:
            raise ValueError(
                f"cu_seqlens: expected values that never descend, "
                f"got {start} then {end} at position {position + 1}"
            )
    if bounds[-1] != length:
        raise ValueError(
            f"cu_seqlens: expected the last value to be L = {length}, got {bounds[-1]}"
        )
    return bounds


def _short(value: torch.dtype) -> str:
    return str(value).removeprefix("torch.")


def _listed(values: Iterable[torch.dtype]) -> str:
    return " or ".join(_short(value) for value in values)
