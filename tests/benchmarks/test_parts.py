"""The check, the goals, the clock and the roof."""

import dataclasses
import math
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kexue_kernels.benchmarks import check, clock, goals, measure, roof
from kexue_kernels.benchmarks.case import Bound
from kexue_kernels.benchmarks.results import CaseResult, Measurement
from tests.benchmarks import toy


def errors_of(function, direction="forward"):  # type: ignore[no-untyped-def]
    case = toy.case(direction=direction)
    inputs, grad = case.make(toy.CPU), case.cotangent(toy.CPU)
    bound = Bound(toy.contestant("x", function), case.direction, inputs, grad)
    return check.judge(bound.results(), check.expect(case, inputs, grad))


@pytest.mark.parametrize("direction", ["forward", "backward", "forward+backward"])
def test_the_right_product_passes(direction: str) -> None:
    errors, wrong = errors_of(toy.product, direction)
    assert wrong == ""
    named = {"output"} if direction == "forward" else {"output", "gradient of a", "gradient of b"}
    assert set(errors) == named


def test_a_wrong_gradient_is_caught() -> None:
    _, wrong = errors_of(lambda a, b: a * b.detach() + 0 * b, "forward+backward")
    assert "in the gradient of b" in wrong
    assert "output" not in wrong


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_wrong(value: float) -> None:
    errors, wrong = errors_of(lambda a, b: (a * b).index_fill(0, torch.tensor([3]), value))
    assert "error inf in the output" in wrong
    assert errors["output"]["error"] is None  # JSON has no infinity


def in_turn(a: Tensor, b: Tensor) -> Tensor:
    """Product after product, in float32: PyTorch's `bmm` of vectors is no better."""
    total = torch.zeros(a.shape[0])
    for a_k, b_k in zip(a.unbind(1), b.unbind(1), strict=True):
        total = total + a_k * b_k
    return total


def with_ten_bits(x: Tensor) -> Tensor:
    """Fractions of ten bits, as those of TensorFloat-32."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize(
    ("dots", "passes"),
    [
        (in_turn, True),
        (lambda a, b: (with_ten_bits(a) * with_ten_bits(b)).sum(1), False),
        (lambda a, b: (a * b)[:, 1:].sum(1), False),
    ],
    ids=["in another order", "in less precision", "with a term left out"],
)
def test_long_sums(dots: Callable[[Tensor, Tensor], Tensor], passes: bool) -> None:
    case = dataclasses.replace(
        toy.case(),
        shape={"rows": 256, "terms": 2048},
        output_shape=(256,),
        make=lambda device: dict(zip("ab", torch.randn(2, 256, 2048).unbind(), strict=True)),
        reference=toy.contestant("reference", lambda a, b: (a * b).sum(1)),
    )
    torch.manual_seed(0)
    inputs, grad = case.make(toy.CPU), case.cotangent(toy.CPU)
    found = {"output": dots(*inputs.values())}
    assert (check.judge(found, check.expect(case, inputs, grad))[1] == "") is passes


def test_a_reference_that_is_not_finite_judges_nothing() -> None:
    case = toy.case(reference=toy.contestant("x", lambda a, b: a * b / 0))
    with pytest.raises(ValueError, match="the reference's output is not finite"):
        check.expect(case, case.make(toy.CPU), case.cotangent(toy.CPU))


def test_another_shape_is_wrong() -> None:
    assert errors_of(lambda a, b: (a * b)[1:])[1]


def judged(goal: goals.Goal, **measured: object) -> tuple[str, float | None]:
    best = Measurement("ours", True, "measured", **measured)  # type: ignore[arg-type]
    result = CaseResult("x", "x", "forward", {}, "float32", 300, 1, "", 100, 1e-6, "memory")
    result.contestants = [best, Measurement("slow ours", True, "measured", seconds=9.0)]
    found = goal.judge(result)
    return found.verdict, found.measured


def test_goals() -> None:
    assert judged(goals.faster("p", 4), seconds=1.0, speedup_over={"p": 4.5}) == ("met", 4.5)
    assert judged(goals.faster("p", 4), seconds=1.0, speedup_over={"p": 3.0}) == ("missed", 3.0)
    assert judged(goals.faster("p", 4), seconds=1.0) == ("not measured", None)
    assert judged(goals.copy_share(0.4), seconds=1.0, copy_share=0.41) == ("met", 0.41)
    assert judged(goals.copy_share(0.4)) == ("not measured", None)
    assert judged(goals.microseconds(15), seconds=14e-6)[0] == "met"
    assert judged(goals.microseconds(15), seconds=16e-6)[0] == "missed"
    assert judged(goals.scratch(100), seconds=1.0, peak_bytes=120) == ("met", 0.2)
    assert judged(goals.scratch(100), seconds=1.0, peak_bytes=200) == ("missed", 1.0)
    assert judged(goals.scratch(100), seconds=1.0)[0] == "not measured"


def test_roof_is_measured_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roof, "buffer_bytes", lambda _: 2**22)
    found = roof.measure(toy.CPU, clock.Clock(toy.CPU), quick=True)
    assert found.copy_bytes_per_second > 1e8
    assert found.flops_per_second["float32"] > 1e8
    fixed = roof.Roof(100.0, 0, {"float32": 10.0, "bfloat16": 40.0})
    assert fixed.seconds(200, 10, torch.float32) == (2.0, "memory")
    assert fixed.seconds(200, 400, torch.bfloat16) == (10.0, "arithmetic")


def test_copy_buffers_are_well_over_the_cache() -> None:
    assert roof.buffer_bytes(toy.CPU) >= 2**28


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_counts_results_and_scratch() -> None:
    mebibyte = 2**20
    x = torch.ones(16 * mebibyte // 4)
    watch = clock.Clock(toy.CPU)
    assert watch.peak_bytes(lambda: None) < mebibyte
    assert watch.peak_bytes(lambda: x.clone()) == pytest.approx(x.nbytes, abs=3 * mebibyte)
    # two products alive as the sum is written
    three = watch.peak_bytes(lambda: (x * x) + (x - x))
    assert three == pytest.approx(3 * x.nbytes, abs=3 * mebibyte)


def test_short_calls_are_repeated() -> None:
    watch = clock.Clock(toy.CPU)
    assert watch.repeats(1e-5) == 200
    assert watch.repeats(1.0) == 1
    calls: list[int] = []
    assert watch.sample(lambda: calls.append(1), 7) > 0
    assert len(calls) == 7


def test_estimates_grow_with_steps_and_direction() -> None:
    found = roof.Roof(1e10, 0, {"float32": 1e11, "bfloat16": 1e11})
    forward = measure.estimate(toy.case(), found, measure.QUICK)
    assert forward > measure.QUICK.seconds
    assert measure.estimate(toy.case(direction="backward"), found, measure.QUICK) > forward
