"""The cases of linear_scan: formulas, references, and every peer's layout."""

import importlib.util
import pathlib
import sys
import types
import unittest.mock

import pytest
import torch
from torch import Tensor

import kexue_kernels as kk
from kexue_kernels.benchmarks import check, linear_scan, linear_scan_peers, scan
from kexue_kernels.benchmarks.case import Bound, Case, Contestant, Direction
from tests.benchmarks.toy import CPU

MIB = 2**20
GPU = torch.device("cuda")


def small(contestant: Contestant, dtype: torch.dtype, **options: object) -> Case:
    options = {"direction": "forward+backward"} | options
    return linear_scan.case((2, 64, 3), dtype, on=lambda *_: [contestant], **options)  # type: ignore[arg-type]


def wrong(case: Case, contestant: Contestant) -> str:
    inputs, grad = case.make(CPU), case.cotangent(CPU)
    bound = Bound(contestant, case.direction, inputs, grad)
    return check.judge(bound.results(), check.expect(case, inputs, grad))[1]


@pytest.mark.parametrize(
    ("direction", "tensors", "per_element"),
    [("forward", 3, 2), ("backward", 5, 3), ("forward+backward", 8, 5)],
)
def test_bytes_and_flops(direction: Direction, tensors: int, per_element: int) -> None:
    case = linear_scan.case((4, 2048, 512), direction=direction, on=lambda *_: [])
    assert case.bytes == tensors * 16 * MIB
    assert case.flops == per_element * 4 * MIB
    assert case.result_bytes == {3: 1, 5: 2, 8: 3}[tensors] * 16 * MIB


def test_bytes_and_flops_of_a_time_invariant_complex_decay() -> None:
    b = 4 * 2048 * 256
    counts = {}
    for direction in ("forward", "backward"):
        case = linear_scan.case(
            (4, 2048, 256), torch.complex64, direction, on=lambda *_: [], time_invariant=True
        )
        counts[direction] = case.bytes, case.flops
    assert counts["forward"] == (8 * (2 * b + 256), 8 * b)
    assert counts["backward"] == (8 * (3 * b + 2 * 256), 8 * b + 6 * b + 2 * (b - 256))


def test_packed_boundaries_are_counted() -> None:
    case = linear_scan.case((1, 64, 3), lengths=(60, 4), on=lambda *_: [])
    assert case.bytes == 4 * 3 * 64 * 3 + 8 * 3


def test_uneven_lengths_sum_up() -> None:
    lengths = linear_scan.uneven(8192, 8)
    assert sum(lengths) == 8192
    assert list(lengths) == sorted(lengths)
    assert lengths[0] < 1000 < lengths[-1]


@pytest.mark.parametrize("device", [CPU, GPU])
def test_cases_are_named_once(device: torch.device) -> None:
    names = [case.name for case in linear_scan.cases(device)]
    assert len(set(names)) == len(names)
    assert any(case.sweep and case.sweep.axis == "L" for case in linear_scan.cases(device))
    assert any(case.sweep and case.sweep.axis == "D" for case in linear_scan.cases(device))


def test_goals_of_the_cases() -> None:
    def texts(device: torch.device, name: str) -> list[str]:
        return [
            g.text for case in linear_scan.cases(device) if case.name == name for g in case.goals
        ]

    assert texts(CPU, "linear_scan forward float32 [4, 2048, 512]")[:3] == [
        "at least 6x torch loop",
        "at least 4x mambapy pscan",
        "at least 40% of copy bandwidth",
    ]
    assert texts(CPU, "linear_scan forward float32 [1, 65536, 64]") == ["at least 20x torch loop"]
    assert texts(CPU, "linear_scan forward float32 [1, 4, 8]") == ["at most 15 us a call"]
    for dtype in ("float32", "bfloat16"):
        for direction, share in (("forward", "90%"), ("backward", "85%")):
            assert texts(GPU, f"linear_scan {direction} {dtype} [8, 16384, 1536]")[:3] == [
                f"at least {share} of copy bandwidth",
                "ahead of accelerated-scan warp",
                "at least 5x fla chunk_hgrn",
            ]
        long = texts(GPU, f"linear_scan forward {dtype} [1, 1048576, 64]")
        assert long == ["at least 70% of copy bandwidth"]


def test_steps_are_the_reference() -> None:
    inputs = small(linear_scan_peers.loop(64), torch.float64).make(CPU)
    expected = kk.reference.linear_scan(**inputs)
    torch.testing.assert_close(linear_scan_peers.steps(**inputs), expected, rtol=1e-12, atol=1e-12)


def test_blocks_are_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_scan_peers, "BLOCK", 16)
    inputs = small(linear_scan_peers.loop(64), torch.float64).make(CPU)
    expected = kk.reference.linear_scan(**inputs)
    torch.testing.assert_close(linear_scan_peers.blocks(**inputs), expected, rtol=1e-12, atol=1e-12)


def test_zeros_in_a_pack_sequences() -> None:
    """The benchmark's reference against the op's own, values and gradients."""
    case = linear_scan.case((1, 64, 3), torch.float64, lengths=(20, 0, 43, 1), on=lambda *_: [])
    inputs, grad = case.make(CPU), case.cotangent(CPU)
    found = Bound(linear_scan_peers.loop(64), "forward+backward", inputs, grad).results()
    a, b = inputs["a"].requires_grad_(), inputs["b"].requires_grad_()
    h = kk.reference.linear_scan(a, b, cu_seqlens=inputs["cu_seqlens"])
    assert isinstance(h, Tensor)
    grad_a, grad_b = torch.autograd.grad(h, (a, b), grad)
    expected = {"output": h, "gradient of a": grad_a, "gradient of b": grad_b}
    torch.testing.assert_close(found, {k: v.detach() for k, v in expected.items()})


@pytest.mark.parametrize("direction", ["forward", "backward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_contestants_are_right(dtype: torch.dtype, direction: str) -> None:
    for contestant in linear_scan.on_cpu(64, dtype, False):
        case = small(contestant, dtype, direction=direction)
        assert contestant.absence() is None, contestant.name
        assert wrong(case, contestant) == "", contestant.name


@pytest.mark.parametrize("options", [{"time_invariant": True}, {"lengths": (20, 0, 43, 1)}])
def test_cpu_contestants_take_every_decay_and_packing(options: dict[str, object]) -> None:
    for contestant in linear_scan.on_cpu(64, torch.float32, False):
        shape = (1, 64, 3) if "lengths" in options else (2, 64, 3)
        case = linear_scan.case(
            shape,
            direction="forward+backward",
            on=lambda *_: [],
            **options,  # type: ignore[arg-type]
        )
        assert wrong(case, contestant) == "", contestant.name


def test_complex_gradients_that_forget_to_conjugate_are_caught() -> None:
    case = small(linear_scan_peers.mambapy(), torch.complex64)
    assert "gradient of a" in wrong(case, linear_scan_peers.mambapy())
    assert wrong(case, linear_scan_peers.ours("cpu")) == ""


def fake(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    module = types.ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def channels_first_scan(gates: Tensor, tokens: Tensor) -> Tensor:
    """[B, D, L], as accelerated-scan documents it."""
    assert gates.is_contiguous()
    assert tokens.is_contiguous()
    return linear_scan_peers.steps(gates.transpose(1, 2), tokens.transpose(1, 2)).transpose(1, 2)


def log_decay_scan(x: Tensor, g: Tensor) -> tuple[Tensor, None]:
    """[B, L, D] with a = exp(g), as fla's chunk_hgrn documents it."""
    return linear_scan_peers.steps(g.exp(), x), None


@pytest.mark.parametrize("direction", ["forward", "backward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_gpu_peers_get_and_give_their_own_layouts(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, direction: str
) -> None:
    for module in ("warp", "scalar", "complex"):
        fake(monkeypatch, f"accelerated_scan.{module}", scan=channels_first_scan)
    fake(monkeypatch, "fla.ops.hgrn", chunk_hgrn=log_decay_scan)
    peers = [
        *linear_scan_peers.accelerated_scan(64, dtype),
        linear_scan_peers.hgrn(dtype, packed=False),
    ]
    fit = [peer for peer in peers if not peer.unfit]
    assert len(fit) == (1 if dtype.is_complex else 3)
    for peer in fit:
        assert wrong(small(peer, dtype, direction=direction), peer) == "", peer.name


def test_what_gpu_peers_do_not_take() -> None:
    warp, scalar = linear_scan_peers.accelerated_scan(100, torch.float32)
    assert "powers of two" in warp.unfit
    assert scalar.unfit == ""
    assert linear_scan_peers.accelerated_scan(131072, torch.float32)[0].unfit
    assert len(linear_scan_peers.accelerated_scan(64, torch.bfloat16)) == 3
    assert linear_scan_peers.hgrn(torch.float32, packed=True).unfit
    assert linear_scan_peers.loop(2**20).unfit
    assert linear_scan_peers.loop(65536).unfit == ""


def test_the_pytest_benchmark_file_takes_the_same_cases() -> None:
    path = pathlib.Path(__file__).parents[2] / "benchmarks" / "test_scan.py"
    spec = importlib.util.spec_from_file_location("pytest_benchmark_cases", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    quick = [case for case in scan.cases(module.DEVICE) if case.quick]
    assert len(module.PAIRS) == sum(len(case.contestants) for case in quick)
    benchmark = unittest.mock.Mock(extra_info={})
    case, contestant = quick[0], quick[0].contestants[0]
    module.test_scan(benchmark, case, contestant)
    (call,) = benchmark.call_args.args
    call()
    assert benchmark.extra_info["bytes"] == case.bytes
