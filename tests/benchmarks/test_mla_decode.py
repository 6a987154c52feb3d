"""The cases of mla_decode: what they count, and that all who take part agree."""

import pytest
import torch

from kexue_kernels.benchmarks import mla_decode, mla_peers
from kexue_kernels.benchmarks.case import Bound

CPU = torch.device("cpu")


def test_what_is_counted() -> None:
    case = mla_decode.case((2, 128, 16), torch.bfloat16, CPU, Tq=2)
    assert case.bytes == 2 * 128 * 1152
    assert case.flops == 2 * 128 * 2 * 16 * 2176
    assert case.result_bytes == 2 * 2 * 16 * 512 * 2


def test_the_goals_are_where_they_should_be() -> None:
    names = {case.name for case in mla_decode.cases(CPU) if case.goals}
    assert names == {
        "mla_decode float32 B = 4, H = 16, 4096 tokens",
        "mla step float32 B = 4, H = 16, 4096 tokens",
    }
    gpu = mla_decode._gpu_cases(torch.device("cuda"))
    assert sum(bool(case.goals) for case in gpu) == 3
    assert any(case.quick for case in mla_decode.cases(CPU))


@pytest.mark.parametrize("whole_step", [False, True])
@pytest.mark.parametrize("Tq", [1, 3])
def test_all_agree(Tq: int, whole_step: bool) -> None:
    case = mla_decode.case((2, 128, 3), torch.float32, CPU, Tq=Tq, whole_step=whole_step)
    inputs = case.make(CPU)
    grad = torch.zeros(())
    found = [
        Bound(contestant, "forward", inputs, grad).results()["output"]
        for contestant in case.contestants
        if contestant.name != mla_peers.COMPILED
    ]
    assert len(found) >= 3
    for output in found:
        assert output.shape == case.output_shape
        torch.testing.assert_close(output, found[0], rtol=1e-4, atol=1e-5)
