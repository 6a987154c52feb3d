"""Fused kernels for PyTorch: linear recurrences, Monarch matrices, latent attention, codebooks."""

from kexue_kernels import hippo, nn, reference
from kexue_kernels._version import __version__
from kexue_kernels.dispatch import BackendUnavailableError, backends, use_backend
from kexue_kernels.integrations import PatchReport, patch, unpatch
from kexue_kernels.mla import (
    flash_mla_with_kvcache,
    merge_attention_states,
    mla_attention,
    mla_cache_append,
    mla_decode,
)
from kexue_kernels.monarch import (
    block_diag_matmul,
    monarch_matmul,
    monarch_to_dense,
    project_to_monarch,
)
from kexue_kernels.nn.mla import CacheFullError
from kexue_kernels.nn.monarch import MonarchReport, monarchize
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
    "CacheFullError",
    "MonarchReport",
    "PatchReport",
    "__version__",
    "backends",
    "block_diag_matmul",
    "codebook_statistics",
    "ema_update_",
    "flash_mla_with_kvcache",
    "fsq",
    "hippo",
    "linear_scan",
    "merge_attention_states",
    "mla_attention",
    "mla_cache_append",
    "mla_decode",
    "monarch_matmul",
    "monarch_to_dense",
    "monarchize",
    "nearest_codebook",
    "nn",
    "patch",
    "project_to_monarch",
    "reference",
    "selective_scan",
    "selective_scan_fn",
    "selective_state_update",
    "unpatch",
    "use_backend",
    "vector_quantize",
]
