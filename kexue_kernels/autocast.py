"""Products inside an op have the dtypes the op chose, whatever autocast would take."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kexue_kernels.checks import REAL


def enabled(kind: str) -> bool:
    """For a kind of device, such as "cuda"."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def promoted(*tensors: Tensor | None) -> list[Any]:
    """Data that autocast left in several real dtypes, in the widest of them."""
    dtypes = [x.dtype for x in tensors if x is not None and x.dtype in REAL]
    if len(set(dtypes)) < 2:
        return list(tensors)
    common = functools.reduce(torch.promote_types, dtypes)
    return [x if x is None or x.dtype not in REAL else x.to(common) for x in tensors]


def widened(*tensors: object) -> list[Any]:
    """States and parameters that autocast left in half precision, in float32."""
    halves = torch.bfloat16, torch.float16
    return [x.float() if isinstance(x, Tensor) and x.dtype in halves else x for x in tensors]


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function of tensors on one device, and whatever else."""

    @functools.wraps(function)
    def guarded(*args: Any, **options: Any) -> Any:
        given = (*args, *options.values())
        kind = next(x.device.type for x in given if isinstance(x, Tensor))
        if not enabled(kind):
            return function(*args, **options)
        with torch.autocast(kind, enabled=False):
            return function(*args, **options)

    return guarded
