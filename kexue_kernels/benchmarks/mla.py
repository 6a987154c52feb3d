"""The family's cases, most important first."""

import torch

from kexue_kernels.benchmarks import attention_kinds, deepseek, mla_attention, mla_decode
from kexue_kernels.benchmarks.case import Case


def cases(device: torch.device) -> list[Case]:
    ops = mla_decode, mla_attention, attention_kinds, deepseek
    found = [case for op in ops for case in op.cases(device)]
    return sorted(found, key=lambda case: case.priority)
