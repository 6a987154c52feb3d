"""Lazy loader of the compiled module `kexue_kernels._C` (see csrc/bindings.cpp)."""

import functools
import importlib
from types import ModuleType
from typing import NamedTuple

# Raised with every change to the signatures in csrc/bindings.cpp, there and here.
INTERFACE = 5


class Extension(NamedTuple):
    module: ModuleType | None
    reason: str  # why there is no module; empty when there is one
    has_cuda: bool


@functools.cache
def load() -> Extension:
    """Import the compiled module once; a missing or stale one gives a reason, never an error."""
    try:
        _C = importlib.import_module("kexue_kernels._C")
    except ImportError as error:
        return Extension(None, f"the C++ extension does not load ({error})", False)
    found = getattr(_C, "interface", None)
    if found != INTERFACE:
        reason = f"the C++ extension is stale (interface {found}, expected {INTERFACE}): reinstall"
        return Extension(None, reason, False)
    return Extension(_C, "", bool(_C.has_cuda))
