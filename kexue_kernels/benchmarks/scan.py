"""The scan family's cases, most important first."""

import torch

from kexue_kernels.benchmarks import linear_scan, mamba, selective_scan
from kexue_kernels.benchmarks.case import Case


def cases(device: torch.device) -> list[Case]:
    found = [op.cases(device) for op in (linear_scan, selective_scan, mamba)]
    return sorted((case for each in found for case in each), key=lambda case: case.priority)
