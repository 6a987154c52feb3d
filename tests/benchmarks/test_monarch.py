"""The cases of monarch_matmul: counts, names, goals, and every peer against the reference."""

import importlib.util
import sys
import types
from functools import partial

import pytest
import torch

import kexue_kernels as kk
from kexue_kernels.benchmarks import check, monarch, monarch_peers
from kexue_kernels.benchmarks.case import Bound, Case, Contestant, Direction
from kexue_kernels.benchmarks.results import CaseResult, Measurement
from tests.benchmarks.toy import CPU

GPU = torch.device("cuda")
BOTH: Direction = "forward+backward"


def small(
    contestant: Contestant, dtype: torch.dtype = torch.float32, direction: Direction = BOTH
) -> Case:
    return monarch.case(24, 4, 9, dtype, direction, on=lambda *_: [contestant], device=CPU)


def wrong(case: Case, contestant: Contestant) -> str:
    inputs, grad = case.make(CPU), case.cotangent(CPU)
    bound = Bound(contestant, case.direction, inputs, grad)
    return check.judge(bound.results(), check.expect(case, inputs, grad))[1]


@pytest.mark.parametrize(
    ("direction", "rows", "weights", "products"),
    [("forward", 2, 1, 1), ("backward", 3, 2, 2), (BOTH, 5, 3, 3)],
)
def test_bytes_and_flops(direction: Direction, rows: int, weights: int, products: int) -> None:
    case = monarch.case(1024, 32, 100, direction=direction, on=lambda *_: [], device=CPU)
    assert case.bytes == 4 * (rows * 100 * 1024 + weights * 2 * 32 * 32 * 32)
    assert case.flops == products * 2 * 100 * 2 * 32 * 32 * 32
    results = {"forward": 102400, "backward": 102400 + 65536, BOTH: 2 * 102400 + 65536}
    assert case.result_bytes == 4 * results[direction]


def test_flops_of_complex_numbers() -> None:
    case = monarch.case(64, 8, 10, torch.complex64, on=lambda *_: [], device=CPU)
    assert case.flops == 8 * 10 * 2 * 64 * 8
    assert case.bytes == 8 * (2 * 10 * 64 + 2 * 64 * 8)


@pytest.mark.parametrize("device", [CPU, GPU])
def test_cases_are_named_once(device: torch.device) -> None:
    cases = monarch.cases(device)
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert any(case.quick for case in cases)
    for axis in ("n", "k", "N"):
        points = [case.sweep for case in cases if case.sweep and case.sweep.axis == axis]
        assert len({point.title for point in points}) == 1
        assert len({point.value for point in points}) == len(points) > 2


def test_goals_of_the_cases() -> None:
    def texts(device: torch.device, name: str) -> list[str]:
        found = [case for case in monarch.cases(device) if case.name == name]
        return [goal.text for case in found for goal in case.goals]

    for n, blocks, dense in ((1024, 32, "3.5"), (4096, 64, "18")):
        size = f"n = {n}, {blocks} blocks, 1024 rows"
        assert texts(CPU, f"monarch_matmul forward float32 {size}") == [
            "at least 1.3x torch-structured",
            f"at least {dense}x torch linear, dense",
        ]
    assert texts(GPU, "monarch_matmul forward bfloat16 n = 1024, 32 blocks, 65536 rows") == [
        "at most 1.4 ns a row",
        "at least 1.9x torch linear, dense",
        "at least 2.7x torch bmm twice",
    ]
    size = "n = 16384, 128 blocks, 16384 rows"
    assert texts(GPU, f"monarch_matmul {BOTH} bfloat16 {size}") == ["at least 1.6x torch bmm twice"]


def test_nanoseconds_a_row() -> None:
    measurement = Measurement("kexue triton", ours=True, seconds=2e-6)
    goal = monarch.nanoseconds_a_row(1000, 1.4)
    result: CaseResult = None  # type: ignore[assignment]  # it is not asked
    assert goal.measure(result, measurement) == pytest.approx(2.0)
    assert not goal.at_least
    assert goal.measure(result, Measurement("kexue triton", ours=True)) is None


DTYPES = (torch.float32, torch.bfloat16, torch.complex64)
PLAIN = [
    monarch_peers.ours("cpu"),
    monarch_peers.bmm(),
    monarch_peers.dense(0, CPU),
    monarch_peers.reference(),
]


@pytest.mark.parametrize("direction", ["forward", BOTH])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("contestant", PLAIN, ids=lambda contestant: contestant.name)
def test_contestants_are_right(
    contestant: Contestant, dtype: torch.dtype, direction: Direction
) -> None:
    assert contestant.absence() is None
    assert wrong(small(contestant, dtype, direction), contestant) == ""


def test_the_compiled_reference_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """As traced; what a compiler makes of it takes long."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    peer = monarch_peers.compiled()
    assert peer.slow
    assert wrong(small(peer, direction="forward"), peer) == ""


@pytest.mark.skipif(
    importlib.util.find_spec("torch_structured") is None, reason="torch-structured not installed"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_torch_structured_is_right(dtype: torch.dtype) -> None:
    peer = monarch_peers.structured()
    assert wrong(small(peer, dtype), peer) == ""


def test_torch_structured_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "torch_structured.monarch.blockdiag_butterfly_multiply"
    fake = types.ModuleType(name)
    vars(fake)["blockdiag_butterfly_multiply"] = kk.reference.monarch_matmul
    monkeypatch.setitem(sys.modules, name, fake)
    parents = name.split(".")
    for i in (1, 2):
        parent = types.ModuleType(".".join(parents[:i]))
        monkeypatch.setitem(sys.modules, parent.__name__, parent)
    peer = monarch_peers.structured()
    assert wrong(small(peer), peer) == ""


def test_other_matrices_are_caught() -> None:
    def swapped(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        return monarch_peers.bmm_twice(x, w2, w1)

    def load(name: str) -> Contestant:
        return Contestant(name, lambda: swapped)

    case = monarch.case(16, 4, 9, direction=BOTH, on=lambda *_: [], device=CPU)
    assert "output" in wrong(case, load("swapped"))


def test_who_multiplies_on_a_gpu() -> None:
    def ours(n: int, blocks: int, **options: object) -> list[str]:
        case = monarch.case(n, blocks, 64, on=monarch_peers.on_gpu, device=GPU, **options)
        return [c.name for c in case.contestants if c.ours]

    both = ["kexue cuda", "kexue triton"]
    for n, blocks in ((1024, 32), (4096, 64), (16384, 128)):
        assert ours(n, blocks, dtype=torch.bfloat16) == both
    assert ours(256, 16, dtype=torch.bfloat16) == both[1:]  # too narrow for a cluster's boxes
    assert ours(1024, 32, dtype=torch.float32) == both[1:]
    assert ours(1024, 32, dtype=torch.bfloat16, direction=BOTH) == both[1:]


def test_dense_matrices_that_do_not_fit() -> None:
    assert monarch_peers.dense(2**31, CPU).absence() is not None
    assert monarch_peers.dense(2**31, GPU).absence() is None
    many = partial(monarch.case, 16384, 128, 4, on=monarch_peers.on_cpu, device=CPU)
    names = {c.name: c.unfit for c in many().contestants}
    assert "1.1 GB" in names[monarch_peers.DENSE]
    assert [name for name, unfit in names.items() if unfit] == [monarch_peers.DENSE]
