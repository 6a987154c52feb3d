"""Multi-head latent attention: the cache."""

from kexue_kernels.nn.mla.cache import CacheFullError, PagedLatentCache, SelectedSequences

__all__ = ["CacheFullError", "PagedLatentCache", "SelectedSequences"]
