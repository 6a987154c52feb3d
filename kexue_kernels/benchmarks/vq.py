"""The vq family's cases, most important first."""

import torch

from kexue_kernels.benchmarks import nearest_codebook, vector_quantize
from kexue_kernels.benchmarks.case import Case


def cases(device: torch.device) -> list[Case]:
    found = [op.cases(device) for op in (nearest_codebook, vector_quantize)]
    return sorted((case for each in found for case in each), key=lambda case: case.priority)
