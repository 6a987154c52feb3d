"""The C++ extension, for the tests of its CPU kernels; `isa` and `keep_threads` are in conftest."""

import shutil
from typing import Any

import pytest

from kexue_kernels import _extension


def extension() -> Any:
    """The compiled module. Skips the test module that asks where nothing could have built it."""
    found = _extension.load()
    if found.module is None and shutil.which("c++") is None:
        pytest.skip(f"{found.reason}; no compiler", allow_module_level=True)
    assert found.module is not None, found.reason
    return found.module


def isas() -> list[str]:
    module = _extension.load().module
    return [] if module is None else module.cpu_isas()
