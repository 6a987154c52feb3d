"""Quantisers built on the functions of `kexue_kernels.vq`."""

from kexue_kernels.nn.vq.converters import (
    from_vector_quantize_pytorch,
    to_vector_quantize_pytorch,
)
from kexue_kernels.nn.vq.residual import ResidualVQ
from kexue_kernels.nn.vq.scalar import FSQ
from kexue_kernels.nn.vq.vector_quantizer import VectorQuantizer

__all__ = [
    "FSQ",
    "ResidualVQ",
    "VectorQuantizer",
    "from_vector_quantize_pytorch",
    "to_vector_quantize_pytorch",
]
