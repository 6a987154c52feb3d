"""The kernel families of this package, found by their shape: a folder with a reference."""

import importlib
from pathlib import Path


def names() -> list[str]:
    root = Path(__file__).parent
    return sorted(path.parent.name for path in root.glob("*/reference.py"))


def ops(family: str) -> list[str]:
    """The family's public functions."""
    return list(importlib.import_module(f"kexue_kernels.{family}").__all__)
