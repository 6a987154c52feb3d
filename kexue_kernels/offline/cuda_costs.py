"""The op's bytes and FLOPs per element behind a CUDA C++ kernel, read off its name.

One function per family: it gets the kernel's name with its template arguments.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

# csrc's `enum class DType`, as a template argument shows it
DTYPES = {"0": ("f32", 4), "1": ("bf16", 2), "2": ("f16", 2), "3": ("c64", 8)}
_DTYPE = re.compile(r"\(kexue::DType\)(\d)")


class Cost(NamedTuple):
    bytes: float
    flops: float


def readable(name: str) -> str:
    """`name` with dtypes spelled out."""
    return _DTYPE.sub(lambda match: DTYPES[match[1]][0], name)


def scan(name: str) -> Cost | None:
    """linear_scan, `a` of b's shape: reads a, b and writes h, or reads a, h, grad_h and writes
    grad_a, grad_b; one multiply-add a step, and in the backward one product more."""
    found = _DTYPE.search(name)
    if found is None:
        return None
    dtype, size = DTYPES[found[1]]
    backward = "backward" in name
    product, multiply_add = (6, 8) if dtype == "c64" else (1, 2)
    return Cost(size * (5 if backward else 3), multiply_add + product * backward)


COSTS: Mapping[str, Callable[[str], Cost | None]] = {"scan": scan}


def cost(family: str, name: str) -> Cost | None:
    return COSTS[family](name) if family in COSTS else None
