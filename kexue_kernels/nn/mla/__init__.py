"""Multi-head latent attention: the layer and its cache."""

from kexue_kernels.nn.mla.attention import MultiheadLatentAttention
from kexue_kernels.nn.mla.cache import CacheFullError, PagedLatentCache, SelectedSequences
from kexue_kernels.nn.mla.rope import RotaryAngles
from kexue_kernels.nn.mla.step import DecodeStep

__all__ = [
    "CacheFullError",
    "DecodeStep",
    "MultiheadLatentAttention",
    "PagedLatentCache",
    "RotaryAngles",
    "SelectedSequences",
]
