"""Fused GPU and CPU kernels for PyTorch: linear recurrences, vector quantisation."""

from kexue_kernels import hippo, nn, reference
from kexue_kernels._version import __version__
from kexue_kernels.dispatch import BackendUnavailableError, backends, use_backend
from kexue_kernels.integrations import PatchReport, patch, unpatch
from kexue_kernels.scan import (
    linear_scan,
    selective_scan,
    selective_scan_fn,
    selective_state_update,
)
from kexue_kernels.vq import (
    codebook_statistics,
    ema_update_,
    fsq,
    nearest_codebook,
    vector_quantize,
)

__all__ = [
    "BackendUnavailableError",
    "PatchReport",
    "__version__",
    "backends",
    "codebook_statistics",
    "ema_update_",
    "fsq",
    "hippo",
    "linear_scan",
    "nearest_codebook",
    "nn",
    "patch",
    "reference",
    "selective_scan",
    "selective_scan_fn",
    "selective_state_update",
    "unpatch",
    "use_backend",
    "vector_quantize",
]
