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
    found = _DTYPE.search(name)
    if found is None:
        return None
    if "selective_state_update" in name:
        return Cost(8, 6)  # a state, in float32: read and written
    cost = _selective_scan if "selective_scan" in name else _linear_scan
    return cost(*DTYPES[found[1]], "backward" in name)


def _linear_scan(dtype: str, size: int, backward: bool) -> Cost:
    """`a` of b's shape: reads a, b and writes h, or reads a, h, grad_h and writes grad_a,
    grad_b; one multiply-add a step, and in the backward one product more."""
    product, multiply_add = (6, 8) if dtype == "c64" else (1, 2)
    return Cost(size * (5 if backward else 3), multiply_add + product * backward)


def _selective_scan(_dtype: str, size: int, backward: bool, n: int = 16) -> Cost:
    """u, delta, z and out, or these and their gradients; n states an element, B and C shared by
    all channels."""
    return Cost(size * 7, 20 * n + 30) if backward else Cost(size * 4, 6 * n + 12)


def mla(name: str) -> Cost | None:
    """Of a number of the cache's rows of 576 for 64 queries, values of 512."""
    return Cost(2, 2 * 64 * (576 + 512) / 576) if "hopper" in name else None


COSTS: Mapping[str, Callable[[str], Cost | None]] = {"scan": scan, "mla": mla}


def cost(family: str, name: str) -> Cost | None:
    return COSTS[family](name) if family in COSTS else None
