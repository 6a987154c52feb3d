"""Linear recurrences."""

from kexue_kernels.scan.linear import linear_scan
from kexue_kernels.scan.selective import selective_scan, selective_scan_fn
from kexue_kernels.scan.state_update import selective_state_update

__all__ = ["linear_scan", "selective_scan", "selective_scan_fn", "selective_state_update"]
