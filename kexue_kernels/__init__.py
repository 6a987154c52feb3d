"""Fused GPU and CPU kernels for PyTorch: linear recurrences today, more families to come."""

from kexue_kernels import nn, reference
from kexue_kernels._version import __version__
from kexue_kernels.dispatch import BackendUnavailableError, backends, use_backend
from kexue_kernels.scan import linear_scan

__all__ = [
    "BackendUnavailableError",
    "__version__",
    "backends",
    "linear_scan",
    "nn",
    "reference",
    "use_backend",
]
