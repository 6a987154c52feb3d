"""The family's cases, most important first."""

import torch

from kexue_kernels.benchmarks import attention_kinds, mla_decode
from kexue_kernels.benchmarks.case import Case


def cases(device: torch.device) -> list[Case]:
    found = [*mla_decode.cases(device), *attention_kinds.cases(device)]
    return sorted(found, key=lambda case: case.priority)
