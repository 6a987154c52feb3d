"""Multi-head latent attention: the public functions of the family."""

from kexue_kernels.mla.append import mla_cache_append
from kexue_kernels.mla.attention import mla_attention
from kexue_kernels.mla.decode import mla_decode
from kexue_kernels.mla.flash import flash_mla_with_kvcache
from kexue_kernels.mla.states import merge_attention_states

__all__ = [
    "flash_mla_with_kvcache",
    "merge_attention_states",
    "mla_attention",
    "mla_cache_append",
    "mla_decode",
]
