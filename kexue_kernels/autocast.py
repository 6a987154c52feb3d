"""Products inside an op have the dtypes the op chose, whatever autocast would take."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def enabled(kind: str) -> bool:
    """For a kind of device, such as "cuda"."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


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
