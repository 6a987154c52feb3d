"""The cases of block_diag_matmul: counts, names, and every contestant against the reference."""

import pytest
import torch

from kexue_kernels.benchmarks import block_diag_matmul, check, monarch
from kexue_kernels.benchmarks.case import Bound, Direction
from tests.benchmarks.toy import CPU

SMALL = 24, 4, 9


@pytest.mark.parametrize("name", ["kexue cpu", block_diag_matmul.BMM, block_diag_matmul.EINSUM])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_contestants_are_right(name: str, direction: Direction) -> None:
    case = block_diag_matmul.case(SMALL, backend="cpu", direction=direction)
    inputs, grad = case.make(CPU), case.cotangent(CPU)
    contestant = next(each for each in case.contestants if each.name == name)
    results = Bound(contestant, direction, inputs, grad).results()
    assert results["output"].shape == case.output_shape
    assert check.judge(results, check.expect(case, inputs, grad))[1] == ""


def test_bytes_and_flops() -> None:
    x, weights = 9 * 24, 4 * 6 * 6
    forward = block_diag_matmul.case(SMALL, backend="cpu")
    assert forward.bytes == 4 * (2 * x + weights)
    assert forward.flops == 2 * 9 * weights
    both = block_diag_matmul.case(SMALL, backend="cpu", direction="forward+backward")
    assert both.bytes == 4 * (5 * x + 3 * weights)
    assert both.flops == 3 * forward.flops
    assert both.result_bytes == 4 * (2 * x + weights)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_they_are_the_family_s(device: str) -> None:
    names = [case.name for case in monarch.cases(torch.device(device))]
    assert sum(name.startswith("block_diag_matmul") for name in names) == 2
