"""The launcher module that serves an op: `kexue_kernels/<family>/<backend>_<op>.py`.

A backend implements an op by having such a module, so what exists is seen without importing it.
"blocked" is plain PyTorch in blocks: the cpu backend where the extension is missing or has no
launcher for the op, and what "auto" takes where no kernel serves.
"""

import functools
import importlib
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from kexue_kernels import _extension, dispatch
from kexue_kernels.checks import DOUBLE

# Kernels (backend, op) that "auto" passes over until a GPU has passed their tests.
OFF_BY_DEFAULT = frozenset({("cuda", "mla_decode"), ("cuda", "monarch_matmul")})


def served_by_reference(op: str, x: Tensor, backend: str) -> bool:
    """Doubles go to the reference, which autograd follows at every order."""
    if backend == "auto" and x.dtype in DOUBLE and not x.is_meta:
        if not torch.compiler.is_compiling():
            dispatch.note_once(f"{op}: {x.dtype} is served by the reference alone")
        return True
    return backend == "reference"


def launcher_of(family: str, op: str, backend: str, data: Tensor) -> ModuleType:
    if backend == "auto":
        backend = dispatch.default()
    return launcher(family, op, backend, data.device, data.dtype)


@functools.cache  # choosing anew would cost more than a small call
def launcher(
    family: str, op: str, backend: str, device: torch.device, dtype: torch.dtype
) -> ModuleType:
    """The module that serves `op` here; "auto" is the fastest that can."""

    def reasons(name: str) -> list[str]:
        found = [f"{dtype} is served by the reference alone"] if dtype in DOUBLE else []
        if backend == "auto" and (name, op) in OFF_BY_DEFAULT:
            found.append("off by default, as no GPU has passed its tests yet")
        return found

    kernels = [name for name in ("triton", "cuda") if implements(family, op, name)]
    asked = {name: functools.partial(reasons, name) for name in ("cpu", *kernels)}
    name = dispatch.choose(op, backend, device, asked)
    if name == "reference" or (name == "cpu" and not _compiled(family, op)):
        name = "blocked"
    return importlib.import_module(f"kexue_kernels.{family}.{name}_{op}")


def _compiled(family: str, op: str) -> bool:
    return _extension.load().module is not None and implements(family, op, "cpu")


def implements(family: str, op: str, name: str) -> bool:
    """Whether a backend has kernels for an op; whether they run here is another matter."""
    return (Path(__file__).parent / family / f"{name}_{op}.py").exists()
