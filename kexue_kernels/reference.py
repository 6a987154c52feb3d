"""The pure-PyTorch reference of every op, by the op's own name and arguments."""

from kexue_kernels.scan.reference import (
    linear_scan,
    selective_scan,
    selective_scan_fn,
    selective_state_update,
)
from kexue_kernels.vq.reference import (
    codebook_statistics,
    ema_update_,
    fsq,
    nearest_codebook,
    vector_quantize,
)

__all__ = [
    "codebook_statistics",
    "ema_update_",
    "fsq",
    "linear_scan",
    "nearest_codebook",
    "selective_scan",
    "selective_scan_fn",
    "selective_state_update",
    "vector_quantize",
]
