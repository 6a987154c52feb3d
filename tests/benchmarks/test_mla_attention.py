"""The cases of mla_attention: what they count, and that all who take part are right."""

import pytest
import torch

from kexue_kernels.benchmarks import check, mla_attention, mla_attention_peers
from kexue_kernels.benchmarks.case import Bound, Case, Direction
from kexue_kernels.benchmarks.measure import blank
from kexue_kernels.benchmarks.results import Measurement
from kexue_kernels.benchmarks.roof import Roof
from tests.benchmarks.toy import CPU

BOTH: Direction = "forward+backward"


def small(dtype: torch.dtype, direction: Direction = BOTH) -> Case:
    return mla_attention.case(70, 2, dtype, direction, on=mla_attention._peers(CPU))


def test_what_is_counted() -> None:
    case = mla_attention.case(1024, 16, torch.float32, BOTH, on=[])
    forward = mla_attention.case(1024, 16, torch.float32, "forward", on=[])
    inputs = 1024 * 16 * 192 + 1024 * 576 + 16 * 256 * 512
    output = 1024 * 16 * 128
    assert forward.bytes == 4 * (inputs + output)
    assert case.bytes == 4 * (3 * inputs + 3 * output)
    assert case.result_bytes == 4 * (inputs + output)
    assert forward.flops == 2 * 1024 * 512 * 16 * 256 + 2 * 16 * 320 * 1024 * 1024 // 2
    assert case.flops == 3 * forward.flops + 16 * 192 * 1024 * 1024


def test_the_goals_are_where_they_should_be() -> None:
    goals = [case.name for case in mla_attention.cases(CPU) if case.goals]
    assert goals == ["mla_attention forward+backward float32 H = 16, T = 1024"]
    gpu = {case.name: len(case.goals) for case in mla_attention._gpu_cases() if case.goals}
    assert gpu == {
        "mla_attention forward bfloat16 H = 128, T = 8192": 1,
        "mla_attention forward+backward bfloat16 H = 128, T = 8192": 4,
        "mla_attention forward+backward bfloat16 H = 128, T = 65536": 1,
    }
    assert any(case.quick for case in mla_attention.cases(CPU))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_are_right(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla_attention_peers, "BLOCK", 32)
    case = small(dtype)
    inputs, grad = case.make(CPU), case.cotangent(CPU)
    expected = check.expect(case, inputs, grad)
    assert len(expected) == 7
    taking_part = [c for c in case.contestants if c.name != mla_attention_peers.COMPILED]
    assert len(taking_part) >= 3
    for contestant in taking_part:
        results = Bound(contestant, BOTH, inputs, grad).results()
        assert results["output"].shape == case.output_shape
        assert check.judge(results, expected)[1] == "", contestant.name


def test_goals_of_memory() -> None:
    case = small(torch.float32)
    spared = mla_attention.spared(("a", "b"), 0.25)
    held = mla_attention.beyond_results(1.5)

    def peak(name: str, beyond: float, ours: bool = False) -> Measurement:
        return Measurement(name, ours, peak_bytes=int(case.result_bytes + beyond))

    found = blank(case, Roof(1e9, 1, {"float32": 1e9}))
    found.contestants = [peak("a", 8e9), peak("b", 4e9), peak("c", 1.0)]
    own = peak("kexue cpu", 1.2e9, ours=True)
    assert spared.measure(found, own) == pytest.approx(0.3)
    assert held.measure(found, own) == pytest.approx(1.2)
    found.contestants = []
    assert spared.measure(found, own) is None
