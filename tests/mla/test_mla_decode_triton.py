"""mla_decode's Triton kernels: in the interpreter on CPU, and on a GPU (`-m gpu`)."""

import pytest
import torch

from kexue_kernels.mla.splits import choose_splits
from kexue_kernels.mla.triton_mla_decode import configure
from tests.mla.cases import CASES, Case, check

MORE = [
    Case((300, 41), H=5, Tq=3, dc=16, dr=8, num_splits=4),
    Case((33, 0, 64), H=70, dc=16, dr=0, block_size=16, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=str)
def test_every_case(case: Case) -> None:
    check(case, "triton")


def test_the_rule_for_splits() -> None:
    assert choose_splits(132, 256, 132) == 1
    assert choose_splits(128, 256, 132) == 1
    assert choose_splits(1, 2048, 132) == 113  # of 132, 85% busy
    assert choose_splits(1, 3, 132) == 3
    assert choose_splits(100, 256, 132) == 5
    assert choose_splits(10**6, 256, 132) == 1


def test_the_rule_for_tiles() -> None:
    assert configure(16, 512, torch.bfloat16, "sm_90").BLOCK_M == 16
    assert configure(17, 512, torch.bfloat16, "sm_90").BLOCK_M == 32
    assert configure(512, 512, torch.bfloat16, "sm_90") == (64, 32, 8, 2)
    assert configure(512, 512, torch.bfloat16, "sm_80").BLOCK_N == 16
    assert configure(512, 512, torch.float32, "sm_80").BLOCK_M == 16


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, *MORE], ids=str)
def test_every_case_on_a_gpu(case: Case) -> None:
    check(case, "triton", device="cuda")
