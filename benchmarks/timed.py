"""A family's quick cases for pytest-benchmark: who takes part, the gate, the clock."""

import functools
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from kexue_kernels.benchmarks import check
from kexue_kernels.benchmarks.case import Bound, Case, Contestant, Gate
from kexue_kernels.benchmarks.runner import FAMILIES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pairs(family: str) -> list[Any]:
    """Every quick case with each of its contestants."""
    return [
        pytest.param(case, contestant, id=f"{case.name} | {contestant.name}")
        for case in FAMILIES[family](DEVICE)
        if case.quick
        for contestant in case.contestants
    ]


def time(benchmark: BenchmarkFixture, case: Case, contestant: Contestant) -> None:
    """Skips who is not there, checks who is, and times the call."""
    if absence := contestant.absence():
        pytest.skip(": ".join(absence))
    if contestant.slow:
        pytest.skip("slow")
    inputs, grad, expected = prepared(case)
    bound = Bound(contestant, case.direction, inputs, grad)
    errors, wrong = gate(case).judge(bound.results(), expected)
    if not contestant.ours and wrong and not contestant.approximate:
        pytest.skip(f"a peer is wrong, so not timed: {wrong}")
    assert contestant.approximate or not wrong, wrong

    def call() -> None:
        bound.call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.name
    benchmark.extra_info.update(bytes=case.bytes, flops=case.flops, counted=case.counted)
    benchmark.extra_info.update(errors=errors)
    benchmark(call)


@functools.lru_cache(maxsize=1)  # a case's contestants follow one another
def prepared(case: Case) -> tuple[dict[str, Tensor], Tensor, Any]:
    inputs, grad = case.make(DEVICE), case.cotangent(DEVICE)
    return inputs, grad, gate(case).expect(case, inputs, grad)


def gate(case: Case) -> Gate:
    return case.gate or check
