"""Vector quantisation."""

from kexue_kernels.vq.quantize import vector_quantize
from kexue_kernels.vq.scalar import fsq
from kexue_kernels.vq.search import nearest_codebook
from kexue_kernels.vq.statistics import codebook_statistics, ema_update_

__all__ = ["codebook_statistics", "ema_update_", "fsq", "nearest_codebook", "vector_quantize"]
