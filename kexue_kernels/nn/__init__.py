"""Modules with state, a folder for each family."""

from kexue_kernels.nn.mla import MultiheadLatentAttention, PagedLatentCache
from kexue_kernels.nn.monarch import MonarchLinear
from kexue_kernels.nn.scan import LRU, RGLRU, S4D, MambaMixer, MambaState
from kexue_kernels.nn.vq import FSQ, ResidualVQ, VectorQuantizer

__all__ = [
    "FSQ",
    "LRU",
    "RGLRU",
    "S4D",
    "MambaMixer",
    "MambaState",
    "MonarchLinear",
    "MultiheadLatentAttention",
    "PagedLatentCache",
    "ResidualVQ",
    "VectorQuantizer",
]
