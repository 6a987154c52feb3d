"""mla_decode over rows of fp8.py: what serves other rows."""

from kexue_kernels.mla.triton_mla_decode import forward

__all__ = ["forward"]
