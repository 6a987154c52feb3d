"""mla_cache_append of rows of fp8.py: what serves other rows."""

from kexue_kernels.mla.blocked_mla_cache_append import append

__all__ = ["append"]
