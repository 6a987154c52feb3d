"""The pure-PyTorch reference of every op, by the op's own name and arguments."""

from kexue_kernels.scan.reference import linear_scan

__all__ = ["linear_scan"]
