"""What can run here, why not, and which backend serves a call."""

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import NamedTuple

import torch

from kexue_kernels import _extension

NAMES = ("reference", "cpu", "triton", "cuda")
MINIMUM_CAPABILITY = (8, 0)

log = logging.getLogger("kexue_kernels")
_default: ContextVar[str] = ContextVar("kexue_kernels_backend", default="auto")


class BackendUnavailableError(RuntimeError):
    """A forced backend can't serve a call; the message lists every reason."""


class BackendStatus(NamedTuple):
    available: bool
    reason: str


def backends() -> Mapping[str, BackendStatus]:
    """Each backend's name -> whether it can run on this machine, and why (or how)."""
    return {name: _STATUS[name]() for name in NAMES}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Make `name` what `backend="auto"` means inside the block (per thread and async task).

    Enter it outside a compiled function: torch.compile does not trace context variables.
    """
    token = _default.set(check_name(name))
    try:
        yield
    finally:
        _default.reset(token)


def check_name(backend: str) -> str:
    if not isinstance(backend, str):
        raise TypeError(f"backend: expected a str, got {type(backend).__name__}")
    if backend != "auto" and backend not in NAMES:
        raise ValueError(f"backend: expected one of auto, {', '.join(NAMES)}, got {backend!r}")
    return backend


def resolve(backend: str) -> str:
    """`backend`, with "auto" replaced by the default of the enclosing `use_backend`."""
    if not isinstance(backend, str) or backend != "auto":
        return check_name(backend)
    return backend if torch.compiler.is_compiling() else _default.get()


def default() -> str:
    """What "auto" means here."""
    return _default.get()


Reasons = Callable[[], list[str]]


def choose(op: str, backend: str, device: torch.device, reasons: Mapping[str, Reasons]) -> str:
    """The backend that serves this call of `op`.

    `reasons[name]()` lists why the backend `name` can't serve the call beyond what its
    status and the device say; a backend that is not in `reasons` does not implement `op`.
    """
    backend = resolve(backend)
    if backend != "auto":
        refused = _refusals(op, backend, device, reasons)
        if refused:
            raise BackendUnavailableError(
                f"{op}: backend {backend!r} can't serve this call: {'; '.join(refused)}"
            )
        return backend
    for candidate in _PREFERENCE.get(device.type, ()):
        refused = _refusals(op, candidate, device, reasons)
        if not refused:
            return candidate
        note_once(f"{op}: passing over backend {candidate!r}: {'; '.join(refused)}")
    return "reference"


# Fastest first. On GPUs this order is a rule of thumb until benchmarks/results has a device's.
_PREFERENCE = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}


def _refusals(
    op: str, backend: str, device: torch.device, reasons: Mapping[str, Reasons]
) -> list[str]:
    if backend == "reference":
        return []
    if backend not in reasons:
        return [f"{op} has no {backend} implementation"]
    found = []
    status = _STATUS[backend]()
    if not status.available:
        found.append(status.reason)
    served = _served_devices(backend)
    if device.type not in served:
        found.append(f"the inputs are on {device.type!r}, it serves {' and '.join(served)} tensors")
    return found + reasons[backend]()


def _served_devices(backend: str) -> tuple[str, ...]:
    if backend == "cpu":
        return ("cpu",)
    if backend == "triton" and interpreting():
        return ("cpu", "cuda")
    return ("cuda",)


@functools.cache
def note_once(message: str) -> None:
    """Log a message the first time it comes up in this process."""
    log.warning(message)


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def _reference_status() -> BackendStatus:
    return BackendStatus(True, "pure PyTorch")


def _cpu_status() -> BackendStatus:
    extension = _extension.load()
    if extension.module is None:
        return BackendStatus(True, f"blocked PyTorch, slower: {extension.reason}")
    return BackendStatus(True, f"C++ extension ({extension.module.cpu_isa()})")


def _triton_status() -> BackendStatus:
    if importlib.util.find_spec("triton") is None:
        return BackendStatus(False, "Triton is not installed")
    if interpreting():
        return BackendStatus(True, "Triton's interpreter (TRITON_INTERPRET is set)")
    if not torch.cuda.is_available():
        return BackendStatus(False, "PyTorch sees no GPU (TRITON_INTERPRET=1 runs it on CPU)")
    return BackendStatus(True, f"Triton on {torch.cuda.get_device_name()}")


def _cuda_status() -> BackendStatus:
    extension = _extension.load()
    if extension.module is None:
        return BackendStatus(False, extension.reason)
    if not extension.has_cuda:
        return BackendStatus(False, "the C++ extension was built without CUDA")
    if torch.version.cuda is None:
        return BackendStatus(False, "this PyTorch has no CUDA support")
    if not torch.cuda.is_available():
        return BackendStatus(False, "PyTorch sees no CUDA device")
    capability = torch.cuda.get_device_capability()
    if capability < MINIMUM_CAPABILITY:
        return BackendStatus(False, f"compute capability {capability} is below (8, 0)")
    return BackendStatus(True, f"CUDA C++ on {torch.cuda.get_device_name()}")


_STATUS: Mapping[str, Callable[[], BackendStatus]] = {
    "reference": _reference_status,
    "cpu": _cpu_status,
    "triton": _triton_status,
    "cuda": _cuda_status,
}
