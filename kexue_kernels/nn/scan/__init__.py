"""Layers built on the recurrences of `kexue_kernels.scan`."""

from kexue_kernels.nn.scan.lru import LRU
from kexue_kernels.nn.scan.mamba import MambaMixer, MambaState
from kexue_kernels.nn.scan.rglru import RGLRU
from kexue_kernels.nn.scan.s4d import S4D

__all__ = ["LRU", "RGLRU", "S4D", "MambaMixer", "MambaState"]
