"""The vq family's cases: counts, goals, truth and gate, and every peer's layout and result."""

import dataclasses
import importlib.util
import sys
import types

import pytest
import torch
from torch import Tensor

import kexue_kernels as kk
from kexue_kernels.benchmarks import (
    goals,
    measure,
    nearest_codebook,
    plots,
    report,
    roof,
    runner,
    vector_quantize,
    vq,
    vq_truth,
)
from kexue_kernels.benchmarks import vq_peers as peers
from kexue_kernels.benchmarks.case import Bound, Case, Contestant
from kexue_kernels.benchmarks.clock import Clock
from kexue_kernels.benchmarks.results import ROWS, CaseResult, Measurement
from tests.benchmarks.toy import CPU

GPU = torch.device("cuda")
SHAPE = (70, 33, 12)
ON_CPU = nearest_codebook.on_cpu(SHAPE, torch.float32)


def small(*contestants: Contestant, dtype: torch.dtype = torch.float32) -> Case:
    return nearest_codebook.case(SHAPE, dtype, on=lambda *_: contestants)


def share(case: Case, contestant: Contestant) -> float | None:
    """Of rows that are wrong."""
    inputs, grad = case.make(CPU), case.cotangent(CPU)
    assert case.gate is not None
    expected = case.gate.expect(case, inputs, grad)
    found = Bound(contestant, case.direction, inputs, grad).results()
    return case.gate.judge(found, expected)[0][ROWS]["error"]


def shifted(x: Tensor, codebook: Tensor) -> Tensor:
    """The right codes but for the first row."""
    found = vq_truth.nearest(x, codebook)
    found[0] = (found[0] + 1) % codebook.shape[0]
    return found


def test_bytes_and_flops() -> None:
    case = nearest_codebook.case((4, 8, 16), torch.bfloat16, on=lambda *_: [])
    assert case.bytes == 2 * (4 + 8) * 16 + 8 * 4
    assert case.flops == 2 * 4 * 8 * 16
    assert case.result_bytes == 8 * 4
    step = vector_quantize.case((4, 8, 16), backend="cpu")
    rows, codes, indices = 4 * 16, 8 * 16, 8 * 4
    search, quantise, backward = rows + codes, 3 * rows, 4 * rows
    statistics, update = rows + codes, 4 * codes
    assert step.bytes == 4 * (search + quantise + backward + statistics + update) + 4 * indices
    assert step.flops == case.flops


def test_goals_of_the_cases() -> None:
    def texts(device: torch.device, ending: str) -> list[str]:
        (found,) = (case for case in vq.cases(device) if case.name.endswith(ending))
        return [goal.text for goal in found.goals]

    assert texts(CPU, "codebook float32 [16384, 256] K = 8192") == [
        "ahead of faiss IndexFlatL2",
        "at least 1.5x torch cdist + argmin",
        "0 rows wrong",
    ]
    assert texts(CPU, "[65536, 16] K = 65536") == ["at most 64 MB beyond inputs"]
    step = ["x vector-quantize-pytorch", "at most 0.1x vector-quantize-pytorch's peak memory"]
    for device, times in ((CPU, "1.5"), (GPU, "5")):
        found = texts(device, "step float32 [32768, 256] K = 8192")
        assert found == [f"at least {times}{step[0]}", step[1], "0 rows wrong"]
    assert texts(GPU, "bfloat16 [65536, 256] K = 8192") == [
        "fast: at least 70% of the matrix rate",
        "fast: ahead of flash-kmeans",
        "exact: 0 rows wrong",
        "exact: at most 1.3x the time of fast",
    ]
    assert texts(GPU, "codebook float32 [65536, 256] K = 8192") == [
        "exact: 0 rows wrong",
        "exact: at least 8x torch cdist + argmin",
        "exact: at least 2x torch product + argmin",
    ]
    assert texts(GPU, "[1048576, 64] K = 1024") == ["at least 50% of the matrix rate"]
    assert texts(GPU, "bfloat16 [256, 256] K = 262144") == ["at least 75% of copy bandwidth"]


def test_the_family_takes_part() -> None:
    for device in (CPU, GPU):
        priorities = [case.priority for case in vq.cases(device)]
        assert priorities == sorted(priorities)
        quick = runner._cases("vq", device, quick=True)
        assert {case.op for case in quick} == {"nearest_codebook", "vector_quantize"}
        assert len(quick) < len(vq.cases(device))


def test_the_truth_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties and near ties too, in blocks of few rows."""
    monkeypatch.setattr(vq_truth, "ELEMENTS", 200)
    g = torch.Generator().manual_seed(0)
    codebook = torch.randn(20, 9, generator=g)
    codebook = torch.cat([codebook, codebook.flip(0), codebook[:1] + 1e-7])
    x = torch.cat([torch.randn(50, 9, generator=g), codebook, (codebook[1:] + codebook[:-1]) / 2])
    for rows in (x, x + 100):
        codes = codebook + (rows[0] - x[0]).round()
        expected = kk.reference.nearest_codebook(rows, codes)
        assert torch.equal(vq_truth.nearest(rows, codes), expected)
    assert torch.equal(vq_truth.nearest(x, codebook[:1]), torch.zeros(len(x), dtype=torch.int64))


def test_the_gate_counts_rows() -> None:
    wrong = Contestant("wrong", lambda: shifted)
    assert share(small(wrong), wrong) == pytest.approx(1 / 70)
    shorter = Contestant("shorter", lambda: lambda x, c: vq_truth.nearest(x, c)[1:])
    assert share(small(shorter), shorter) == 1.0


def test_peers_that_are_not_exact_are_timed_and_ours_are_not() -> None:
    found = roof.Roof(1e10, 2**20, {"float32": 1e11, "bfloat16": 1e11})
    effort = measure.Effort(seconds=0.02, least_rounds=2, most_rounds=3)
    stage = measure.Stage(CPU, found, Clock(CPU), effort)
    contestants = (
        Contestant("ours exact", lambda: shifted, ours=True),
        Contestant("ours fast", lambda: shifted, ours=True, approximate=True),
        Contestant("peer", lambda: shifted, approximate=True),
    )
    result = measure.measure(small(*contestants), stage)
    statuses = {m.name: m.status for m in result.contestants}
    assert statuses == {"ours exact": "wrong", "ours fast": "measured", "peer": "measured"}
    assert {m.rows_wrong() for m in result.contestants} == {1 / 70}
    page = "\n".join(report._case_lines(dataclasses.asdict(result)))
    assert "| ours ahead | rows wrong |" in page
    assert page.count("| 0.0143 |") == 3
    assert {line.count("|") for line in page.splitlines() if line.startswith("|")} == {10}


@pytest.mark.parametrize("contestant", ON_CPU, ids=lambda c: c.name)
def test_cpu_contestants_find_the_codes(contestant: Contestant) -> None:
    if contestant.package and importlib.util.find_spec(contestant.package) is None:
        pytest.skip(f"{contestant.package} is not installed")
    assert contestant.absence() is None
    assert share(small(contestant), contestant) == 0


def test_who_takes_what() -> None:
    notes = {c.name: c.unfit for c in nearest_codebook.on_cpu((65536, 65536, 16), torch.bfloat16)}
    large = "its matrix of rows by codes takes 17.2 GB, several times over"
    assert notes[peers.CDIST] == notes[peers.THEIRS] == large
    assert notes[peers.FAISS] == "takes float32"
    assert notes[peers.PRODUCT] == notes["kexue cpu exact"] == ""


def test_faiss_and_fastkmeans_get_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    class IndexFlatL2:
        def __init__(self, d: int) -> None:
            assert d == SHAPE[2]

        def add(self, codes: object) -> None:
            self.codes = torch.from_numpy(codes)

        def search(self, x: object, count: int) -> tuple[None, object]:
            return None, kk.nearest_codebook(torch.from_numpy(x), self.codes)[:, None].numpy()

    class FastKMeans:
        def __init__(self, d: int, k: int, gpu: bool, use_triton: bool) -> None:
            assert (d, k, gpu, use_triton) == (SHAPE[2], SHAPE[1], False, False)

        def predict(self, x: object) -> object:
            codes = torch.from_numpy(self.centroids)  # type: ignore[attr-defined]
            return kk.nearest_codebook(torch.from_numpy(x), codes).numpy()

    members = {"IndexFlatL2": IndexFlatL2, "omp_set_num_threads": lambda count: None}
    enter(monkeypatch, "faiss", **members)
    enter(monkeypatch, "fastkmeans", FastKMeans=FastKMeans)
    for peer in (peers.faiss(torch.float32), peers.fastkmeans(torch.float32, CPU)):
        assert share(small(peer), peer) == 0


def test_the_kmeans_kernels_get_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def assign(x: Tensor, codes: Tensor, squares: Tensor) -> Tensor:
        assert torch.allclose(squares, x.float().square().sum(-1))
        return kk.nearest_codebook(x, codes).int()

    def triton_kmeans(
        x: Tensor, x_squares: Tensor, codes: Tensor, squares: Tensor, out: Tensor
    ) -> None:
        assert torch.allclose(x_squares, x.float().square().sum(-1))
        assert torch.allclose(squares, codes.float().square().sum(-1))
        out.copy_(kk.nearest_codebook(x, codes))

    enter(monkeypatch, "flash_kmeans.assign_euclid_triton", euclid_assign_triton=assign)
    enter(monkeypatch, "fastkmeans.triton_kernels", triton_kmeans=triton_kmeans)
    for dtype in (torch.float32, torch.bfloat16):
        for peer in (peers.flash_kmeans(SHAPE, GPU), peers.fastkmeans(dtype, GPU)):
            assert share(small(peer, dtype=dtype), peer) == 0


@pytest.mark.parametrize(
    "contestant", vector_quantize.case(SHAPE, backend="cpu").contestants, ids=lambda c: c.name
)
def test_training_steps_are_right(contestant: Contestant) -> None:
    if contestant.package and importlib.util.find_spec(contestant.package) is None:
        pytest.skip(f"{contestant.package} is not installed")
    assert contestant.absence() is None
    assert share(vector_quantize.case(SHAPE, backend="cpu"), contestant) == 0


@pytest.mark.parametrize("part", range(4))
def test_a_wrong_part_of_a_training_step_is_caught(part: int) -> None:
    """Quantized, the gradient of x, the codebook, the loss."""
    case = vector_quantize.case(SHAPE, backend="cpu")
    ours = case.contestants[0]

    def spoilt(parts: tuple[Tensor, ...]) -> Tensor:
        changed = list(parts)
        changed[part] = changed[part] * (1 + 1e-4)
        return vector_quantize.together(changed)

    assert share(case, dataclasses.replace(ours, to_case=spoilt)) != 0


def test_curves_show_what_sets_the_roof() -> None:
    record = {"roof": {"copy_bytes_per_second": 5e9}}
    sweep = {"title": "t", "axis": "N", "value": 1}
    product = {"sweep": sweep, "bound": "arithmetic", "flops": 10**12, "roof_seconds": 0.5}
    copy = {"sweep": sweep, "bound": "memory", "flops": 1, "roof_seconds": 1.0}
    rate, *products = plots._scale(record, [product, product])
    assert products == ["TFLOP/s", 2.0, "matrix rate"]
    assert rate(product, {"tflop_per_second": 1.5}) == 1.5
    assert plots._scale(record, [product, copy])[2:] == (5.0, "copy bandwidth")
    axes = {case.sweep.axis for device in (CPU, GPU) for case in vq.cases(device) if case.sweep}
    assert axes <= set(plots._AXES)


def test_goals_for_a_kind_of_ours() -> None:
    def judged(goal: goals.Goal) -> tuple[str, float | None, str]:
        result = CaseResult("x", "x", "forward", {}, "float32", 300, 1, "", 100, 1e-6, "arithmetic")
        result.contestants = [
            Measurement("a fast", True, "measured", seconds=2.0, roof_share=0.8),
            Measurement("a exact", True, "measured", seconds=2.5, peak_bytes=10**6),
        ]
        result.contestants[1].errors = {ROWS: {"error": 0.0, "limit": 0.0}}
        found = goal.judge(result)
        return found.verdict, found.measured, found.by

    (exact,) = goals.of("exact", goals.beside("fast", 1.3))
    assert exact.text == "exact: at most 1.3x the time of fast"
    assert judged(exact) == ("met", 1.25, "a exact")
    assert judged(goals.matrix_share(0.7)) == ("met", 0.8, "a fast")
    assert judged(*goals.of("exact", goals.megabytes(0.5))) == ("missed", 1.0, "a exact")
    assert judged(*goals.of("exact", goals.no_rows_wrong())) == ("met", 0.0, "a exact")
    assert judged(*goals.of("loose", goals.no_rows_wrong())) == ("not measured", None, "")


def enter(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    module = types.ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)
