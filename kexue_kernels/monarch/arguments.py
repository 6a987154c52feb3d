"""What the functions of the monarch family do with their arguments: checks, and autocast.

A check raises before anything runs.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kexue_kernels import autocast, checks, options


def in_autocast_dtype(first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """As `torch.nn.functional.linear` takes them: in autocast's dtype where that is on."""
    kind = first.device.type
    if not autocast.enabled(kind):
        return first, *others
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        x if x is None or x.dtype not in checks.HALF_AND_SINGLE else x.to(dtype)
        for x in (first, *others)
    )


def tensors(**given: object) -> None:
    for name, value in given.items():
        if value is not None or name != "bias":
            checks.tensor(name, value)


def rows(x: Tensor, w: Tensor, name: str) -> None:
    """x [..., k*p] beside w [k, q, p], in one dtype on one device."""
    checks.dtype("x", x, checks.FLOATING)
    factor(name, w, "[k, q, p]", x, "x")
    k, _, p = w.shape
    if x.ndim < 1 or x.shape[-1] != k * p:
        raise ValueError(
            f"x: expected shape [..., k*p] = [..., {k * p}] ({name} is {list(w.shape)}), "
            f"got {list(x.shape)}"
        )


def factor(name: str, w: Tensor, axes: str, like: Tensor, owner: str) -> None:
    checks.dtype(name, w, (like.dtype,))
    checks.device(name, w, like.device, owner)
    checks.ndim(name, w, 3, axes)


def second_factor(w1: Tensor, w2: Tensor) -> None:
    """w2 [l, s, r] that takes what w1 [k, q, p] gives."""
    factor("w2", w2, "[l, s, r]", w1, "w1")
    (k, q, _), (l, _, r) = w1.shape, w2.shape
    if l * r != k * q:
        raise ValueError(
            f"w2: expected shape [l, s, r] with l*r = k*q = {k * q} (w1 is {list(w1.shape)}), "
            f"got l*r = {l * r} ({list(w2.shape)})"
        )


def bias(value: Tensor | None, x: Tensor, features: int, axes: str) -> None:
    if value is not None:
        checks.dtype("bias", value, (x.dtype,))
        checks.shape("bias", value, (features,), axes)
        checks.device("bias", value, x.device, "x")


def check_rank(value: object, s: int, p: int) -> None:
    """Of blocks s x p."""
    options.integer("rank", value)
    assert isinstance(value, int)
    if value > min(s, p):
        raise ValueError(f"rank: expected at most {min(s, p)} for blocks {s} x {p}, got {value}")


def flat(x: Tensor) -> Tensor:
    """[N, features], copied only where the leading axes don't fold."""
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def unflat(y: Tensor, x: Tensor) -> Tensor:
    """[N, features] -> features for each of x's leading axes."""
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[-1])
