"""The cases of selective_scan: counts, goals, and every peer's layout and result."""

import sys
import types

import pytest
import torch
from torch import Tensor

import kexue_kernels as kk
from kexue_kernels.benchmarks import check, scan, selective_scan
from kexue_kernels.benchmarks import selective_scan_peers as peers
from kexue_kernels.benchmarks.case import Bound, Case, Contestant
from tests.benchmarks.toy import CPU

GPU = torch.device("cuda")
MAIN = "selective_scan forward float32 [1, 2048, 1536] n = 16"


def small(contestant: Contestant, dtype: torch.dtype = torch.float32) -> Case:
    return selective_scan.case((2, 16, 3, 4), dtype, "forward+backward", on=[contestant])


def wrong(case: Case, contestant: Contestant) -> str:
    inputs, grad = case.make(CPU), case.cotangent(CPU)
    bound = Bound(contestant, case.direction, inputs, grad)
    return check.judge(bound.results(), check.expect(case, inputs, grad))[1]


def test_bytes_and_flops() -> None:
    shape = (2, 8, 4, 16)
    forward = selective_scan.case(shape, torch.bfloat16, on=[])
    assert forward.bytes == 2 * (4 * 64 + 2 * 256)
    assert forward.flops == 6 * 1024 + 12 * 64
    both = selective_scan.case(shape, torch.bfloat16, "forward+backward", on=[])
    assert both.bytes == forward.bytes + 2 * (7 * 64 + 4 * 256)
    assert both.result_bytes == 2 * (4 * 64 + 2 * 256)


def test_goals_of_the_cases() -> None:
    def texts(device: torch.device, name: str) -> list[str]:
        return [g.text for case in scan.cases(device) if case.name == name for g in case.goals]

    assert texts(CPU, MAIN) == ["at least 15x Transformers' slow path", "at least 20x mambapy"]
    assert texts(CPU, MAIN.replace("forward", "forward+backward")) == ["at least 12x mambapy"]
    main = "selective_scan {} bfloat16 [8, 2048, 2048] n = 16"
    assert texts(GPU, main.format("forward")) == [
        "at least 1.3x mamba-ssm",
        "at least 2.0e+11 elements/s",
    ]
    assert texts(GPU, main.format("backward")) == ["at least 1.5x mamba-ssm"]
    both = texts(GPU, main.format("forward+backward"))
    assert both == ["at most 1.1x mamba-ssm's peak memory"]
    assert texts(CPU, "mamba-130m prefill float32 [1, 2048] 24 layers") == [
        "at least 4x Transformers"
    ]


@pytest.mark.parametrize(
    "contestant",
    [peers.ours("cpu"), peers.transformers(), peers.mambapy(), peers.loop()],
    ids=lambda c: c.name,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_contestants_are_right(contestant: Contestant, dtype: torch.dtype) -> None:
    """But for the slow path in bfloat16, which rounds dt and y on the way."""
    assert contestant.absence() is None
    rounds = contestant.name == peers.TRANSFORMERS and dtype == torch.bfloat16
    assert (wrong(small(contestant, dtype), contestant) == "") is not rounds


def test_mamba_ssm_gets_and_gives_its_own_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    def scan_fn(u: Tensor, *rest: Tensor, delta_softplus: bool) -> Tensor:
        assert u.is_contiguous()
        assert u.shape == (2, 3, 16)
        found = kk.reference.selective_scan_fn(u, *rest, delta_softplus)
        assert isinstance(found, Tensor)
        return found

    module = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    vars(module)["selective_scan_fn"] = scan_fn
    monkeypatch.setitem(sys.modules, module.__name__, module)
    peer = peers.mamba_ssm()
    assert wrong(small(peer), peer) == ""
