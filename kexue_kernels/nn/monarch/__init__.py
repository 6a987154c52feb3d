"""Layers built on the functions of `kexue_kernels.monarch`, and the conversion of whole models."""

from kexue_kernels.nn.monarch.conversion import ConvertedLayer, MonarchReport, monarchize
from kexue_kernels.nn.monarch.linear import MonarchLinear

__all__ = ["ConvertedLayer", "MonarchLinear", "MonarchReport", "monarchize"]
