"""mla_cache_append by the C++ extension on CPU: passes addresses and strides."""

from typing import Any

import torch
from torch import Tensor

from kexue_kernels import _extension
from kexue_kernels.mla import arguments
from kexue_kernels.mla.cpu_mla_decode import CODES

_C: Any = _extension.load().module  # the operator asks whether there is one

CHECKS_VALUES = True  # slots: the operator, which would take longer, need not

_NONE = 0, (0, 0, 0)


def append(
    kv_latent: Tensor,
    k_rope: Tensor,
    pages: Tensor,
    slot_mapping: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    rope_interleaved: bool,
) -> None:
    """kv_latent [T, dc] and k_rope [T, dr] into pages [num_blocks, block_size, dc + dr]."""
    served = _C.mla_cache_append(
        torch.get_num_threads(),
        CODES[kv_latent.dtype],
        (kv_latent.data_ptr(), *kv_latent.stride()),
        kv_latent.shape[1],
        (k_rope.data_ptr(), *k_rope.stride()),
        k_rope.shape[1],
        (pages.data_ptr(), *pages.stride()),
        pages.shape[0],
        pages.shape[1],
        slot_mapping.data_ptr(),
        slot_mapping.shape[0],
        *_rows(norm_weight),
        norm_eps,
        *_rows(cos),
        *_rows(sin),
        rope_interleaved,
    )
    if not served:
        arguments.slots_in_reach(slot_mapping, pages)  # says what is wrong


def _rows(x: Tensor | None) -> tuple[int, tuple[int, ...]]:
    """The code of its dtype, its address and strides; of a vector, as one row for all tokens."""
    if x is None:
        return _NONE
    return CODES[x.dtype], (x.data_ptr(), *(x.stride() if x.ndim == 2 else (0, x.stride(0))))
