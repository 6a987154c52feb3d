"""Lazy loader of the compiled module `kexue_kernels._C` (see csrc/bindings.cpp)."""

import functools
import importlib
from types import ModuleType
from typing import NamedTuple

# Raised with every change to the signatures in csrc/bindings.cpp, there and here.
INTERFACE = 5

NAME = "kexue_kernels._C"


class Extension(NamedTuple):
    module: ModuleType | None
    reason: str  # why there is no module; empty when there is one
    has_cuda: bool


@functools.cache
def load() -> Extension:
    """Import the compiled module once; where it can't serve, a reason is given, never an error."""
    try:
        _C = importlib.import_module(NAME)
    except ImportError as error:
        return Extension(None, _why(error), False)
    found = getattr(_C, "interface", None)
    if found != INTERFACE:
        reason = f"the C++ extension is stale (interface {found}, expected {INTERFACE}): reinstall"
        return Extension(None, reason, False)
    return Extension(_C, "", bool(_C.has_cuda))


def _why(error: ImportError) -> str:
    """No file for this Python, or one that fails, perhaps for lack of another module."""
    if isinstance(error, ModuleNotFoundError) and error.name == NAME:
        return "the C++ extension is not built (`pip install .` in a checkout builds it)"
    return f"the C++ extension does not load ({error})"
