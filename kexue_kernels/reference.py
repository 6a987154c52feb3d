"""The pure-PyTorch reference of every op, by the op's own name and arguments."""

from kexue_kernels.mla.reference import (
    flash_mla_with_kvcache,
    merge_attention_states,
    mla_attention,
    mla_cache_append,
    mla_decode,
)
from kexue_kernels.monarch.reference import (
    block_diag_matmul,
    monarch_matmul,
    monarch_to_dense,
    project_to_monarch,
)
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
    "block_diag_matmul",
    "codebook_statistics",
    "ema_update_",
    "flash_mla_with_kvcache",
    "fsq",
    "linear_scan",
    "merge_attention_states",
    "mla_attention",
    "mla_cache_append",
    "mla_decode",
    "monarch_matmul",
    "monarch_to_dense",
    "nearest_codebook",
    "project_to_monarch",
    "selective_scan",
    "selective_scan_fn",
    "selective_state_update",
    "vector_quantize",
]
