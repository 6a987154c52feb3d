"""The scan family's quick cases under pytest-benchmark: pytest benchmarks/ --benchmark-only."""

import functools

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from kexue_kernels.benchmarks import check, scan
from kexue_kernels.benchmarks.case import Bound, Case, Contestant

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAIRS = [
    pytest.param(case, contestant, id=f"{case.name} | {contestant.name}")
    for case in scan.cases(DEVICE)
    if case.quick
    for contestant in case.contestants
]


@pytest.mark.parametrize(("case", "contestant"), PAIRS)
def test_scan(benchmark: BenchmarkFixture, case: Case, contestant: Contestant) -> None:
    if absence := contestant.absence():
        pytest.skip(": ".join(absence))
    if contestant.slow:
        pytest.skip("slow")
    inputs, grad, expected = prepared(case)
    bound = Bound(contestant, case.direction, inputs, grad)
    _, wrong = check.judge(bound.results(), expected)
    if not contestant.ours and wrong:
        pytest.skip(f"a peer is wrong, so not timed: {wrong}")
    assert not wrong

    def call() -> None:
        bound.call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.name
    benchmark.extra_info.update(bytes=case.bytes, flops=case.flops, counted=case.counted)
    benchmark(call)


@functools.lru_cache(maxsize=1)  # a case's contestants follow one another
def prepared(case: Case) -> tuple[dict[str, Tensor], Tensor, dict[str, check.Expected]]:
    inputs, grad = case.make(DEVICE), case.cotangent(DEVICE)
    return inputs, grad, check.expect(case, inputs, grad)
