"""Monarch matrices: products of two block-diagonal matrices with a permutation between."""

from kexue_kernels.monarch.products import block_diag_matmul, monarch_matmul, monarch_to_dense
from kexue_kernels.monarch.projection import project_to_monarch
from kexue_kernels.monarch.transforms import dft as dft
from kexue_kernels.monarch.transforms import hadamard as hadamard

__all__ = ["block_diag_matmul", "monarch_matmul", "monarch_to_dense", "project_to_monarch"]
