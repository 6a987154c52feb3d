"""Modules with state, one file a family."""

from kexue_kernels.nn.scan import LRU

__all__ = ["LRU"]
