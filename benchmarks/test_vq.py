"""The vq family's quick cases under pytest-benchmark: pytest benchmarks/ --benchmark-only."""

import pytest
import timed
from pytest_benchmark.fixture import BenchmarkFixture

from kexue_kernels.benchmarks.case import Case, Contestant


@pytest.mark.parametrize(("case", "contestant"), timed.pairs("vq"))
def test_vq(benchmark: BenchmarkFixture, case: Case, contestant: Contestant) -> None:
    timed.time(benchmark, case, contestant)
