"""Whole runs of a toy family, on CPU."""

import dataclasses
import io
import json
import math
import pathlib
import time

import pytest
import torch
from PIL import Image
from rich.console import Console

from kexue_kernels.benchmarks import measure, roof, runner
from kexue_kernels.benchmarks.case import Case
from kexue_kernels.benchmarks.clock import Clock
from kexue_kernels.benchmarks.measure import Effort, Stage
from kexue_kernels.benchmarks.results import NO_TIME, CaseResult
from tests.benchmarks import toy

ROOF = roof.Roof(1e10, 2**20, {"float32": 1e11, "bfloat16": 1e11})
BRIEF = Effort(seconds=0.02, least_rounds=2, most_rounds=4, slow_too=False)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roof, "measure", lambda *_: ROOF)
    monkeypatch.setattr(runner, "QUICK", BRIEF)


def enter(monkeypatch: pytest.MonkeyPatch, *cases: Case) -> None:
    monkeypatch.setitem(runner.FAMILIES, "toy", lambda _: list(cases))  # type: ignore[arg-type]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def stage(effort: Effort = BRIEF, deadline: float = math.inf) -> Stage:
    return Stage(toy.CPU, ROOF, Clock(toy.CPU), effort, deadline)


def statuses(result: CaseResult) -> dict[str, str]:
    return {m.name: m.status for m in result.contestants}


def test_a_run_leaves_json_markdown_and_plots(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    enter(monkeypatch, toy.case(32), toy.case(64), toy.case(64, "forward+backward"))
    console = quiet()
    returned = runner.run("toy", quick=True, device="cpu", out=tmp_path, console=console)
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record == json.loads(json.dumps(returned))
    assert record["command"] == "python -m kexue_kernels bench toy --quick --device cpu"
    assert record["date"].endswith("+00:00")
    assert record["versions"]["torch"] == torch.__version__
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert record["roof"]["copy_bytes_per_second"] == ROOF.copy_bytes_per_second
    assert [case["name"] for case in record["cases"]] == [
        "product forward 32",
        "product forward 64",
        "product forward+backward 64",
    ]
    for case in record["cases"]:
        ours, peer, *others = case["contestants"]
        for m in (ours, peer):
            assert m["status"] == "measured"
            assert m["rounds"] >= BRIEF.least_rounds
            assert 0 < m["quartiles"][0] <= m["seconds"] <= m["quartiles"][1]
            assert m["gb_per_second"] == pytest.approx(case["bytes"] / m["seconds"] / 1e9)
            assert m["roof_share"] == pytest.approx(case["roof_seconds"] / m["seconds"])
        assert ours["speedup_over"] == {"peer": pytest.approx(peer["seconds"] / ours["seconds"])}
        assert all(m["seconds"] is None for m in others)
        assert [goal["verdict"] for goal in case["goals"]] == ["met", "missed", "not measured"]
    page = (tmp_path / "bench.md").read_text()
    assert "| **ours** |" in page
    assert "wrong: error" in page
    assert "12,288 bytes, 1,024 FLOPs" in page
    assert record["plots"] == ["product-forward.png", "overview.png"]  # a point is no curve
    for name in record["plots"]:
        with Image.open(tmp_path / name) as image:
            colours = image.convert("RGB").getcolors(2**24)
            assert image.width > 500
        assert colours is not None
        assert len(colours) > 20  # curves, text, a grid
    assert not list(tmp_path.glob("*.unfinished"))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "missed" in said
    assert "failed: wrong peer, raising peer" in said


def test_a_case_measured_again_takes_its_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    enter(monkeypatch, toy.case(32), toy.case(64))
    runner.run("toy", quick=True, device="cpu", out=tmp_path, console=quiet())
    first = json.loads((tmp_path / "bench.json").read_text())
    enter(monkeypatch, toy.case(32), toy.case(64), toy.case(64, "forward+backward"))
    runner.run("toy", device="cpu", out=tmp_path, again="64", quick=True, console=quiet())
    both = json.loads((tmp_path / "bench.json").read_text())
    names = ["product forward 32", "product forward 64", "product forward+backward 64"]
    assert [case["name"] for case in both["cases"]] == names
    assert both["cases"][0] == first["cases"][0]
    assert both["cases"][1]["seconds"] != first["cases"][1]["seconds"]
    assert (both["date"], both["command"]) == (first["date"], first["command"])
    (again,) = both["again"]
    assert again["cases"] == names[1:]
    assert again["command"].endswith("--again '64'")
    assert "- measured again " in (tmp_path / "bench.md").read_text()
    with pytest.raises(ValueError, match="again: expected words of a case's name, got 'none'"):
        runner.run("toy", quick=True, device="cpu", out=tmp_path, again="none", console=quiet())
    nowhere = tmp_path / "nowhere"
    with pytest.raises(ValueError, match="again: expected a folder with results"):
        runner.run("toy", quick=True, device="cpu", out=nowhere, again="64", console=quiet())


def test_every_contestant_has_its_reason() -> None:
    result = measure.measure(toy.case(), stage())
    assert statuses(result) == {
        "ours": "measured",
        "peer": "measured",
        "wrong peer": "wrong",
        "raising peer": "error",
        "missing peer": "not installed",
        "unfit peer": "left out",
        "slow peer": "left out",
    }
    notes = {m.name: m.note for m in result.contestants}
    assert notes["wrong peer"].startswith("error ")
    assert notes["raising peer"] == "RuntimeError: no such kernel"
    assert notes["unfit peer"] == "takes even lengths"


def test_a_wrong_contestant_is_not_timed() -> None:
    calls = []

    def count(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return toy.off_by_a_hair(a, b)

    result = measure.measure(toy.case(contestants=(toy.contestant("wrong", count),)), stage())
    assert statuses(result) == {"wrong": "wrong"}
    assert len(calls) == 1


def test_a_contestant_that_raises_between_rounds_is_recorded() -> None:
    calls = []

    def tires(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 4:  # past the check, the warm call and the memory's
            raise MemoryError("spent")
        return a * b

    case = toy.case(contestants=(toy.contestant("tires", tires), toy.OURS))
    result = measure.measure(case, stage())
    assert statuses(result) == {"tires": "error", "ours": "measured"}
    assert result.contestants[0].note == "MemoryError: spent"


def test_a_reference_that_fails_fails_its_case_alone() -> None:
    result = measure.measure(toy.case(reference=toy.RAISING), stage())
    assert (result.status, result.note) == ("error", "RuntimeError: no such kernel")
    assert {m.status for m in result.contestants} == {"not run"}
    assert {goal.verdict for goal in result.goals} == {"not measured"}


def test_no_case_starts_after_the_time_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    enter(monkeypatch, toy.case(32), toy.case(64))
    record = runner.run("toy", device="cpu", out=tmp_path, time_limit=0.0, console=quiet())
    assert record["not_run"] == ["product forward 32", "product forward 64"]
    assert {m["note"] for case in record["cases"] for m in case["contestants"]} == {NO_TIME}
    assert "- product forward 32: time limit" in (tmp_path / "bench.md").read_text()
    assert record["plots"] == []


def test_a_case_that_may_outlast_what_is_left_is_not_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = toy.case(32), toy.case(64)

    def slow(case: Case, stage: Stage) -> CaseResult:
        result = measure.blank(case, stage.roof)
        result.seconds = 1e6 * measure.estimate(case, stage.roof, stage.effort)
        return result

    monkeypatch.setattr(runner, "measure", slow)
    results: list[CaseResult] = []
    limited = stage(deadline=time.monotonic() + 600)
    runner._perform([first, second], limited, results, lambda: None, quiet())
    assert [result.status for result in results] == ["measured", "not run"]


def test_no_call_starts_after_the_time_limit() -> None:
    calls = []

    def count(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return a * b

    case = toy.case(contestants=(toy.contestant("late", count),))
    result = measure.measure(case, stage(deadline=time.monotonic() - 1))
    assert calls == []
    assert statuses(result) == {"late": "not run"}
    assert result.contestants[0].note == NO_TIME


def test_results_are_written_after_every_case(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    seen = []

    def look(case: Case, stage: Stage) -> CaseResult:
        seen.append(len(json.loads((tmp_path / "bench.json").read_text())["cases"]))
        return measure.blank(case, stage.roof)

    monkeypatch.setattr(runner, "measure", look)
    enter(monkeypatch, toy.case(32), toy.case(64), toy.case(128))
    runner.run("toy", device="cpu", out=tmp_path, console=quiet())
    assert seen == [0, 1, 2]


def test_quick_runs_the_quick_cases_alone() -> None:
    for device in (toy.CPU, torch.device("cuda")):
        every = runner._cases("scan", device, quick=False)
        quick = runner._cases("scan", device, quick=True)
        assert 0 < len(quick) < len(every)
        assert [case.priority for case in every] == sorted(case.priority for case in every)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"family": "spam"}, "family: expected one of scan, mla, monarch, vq, got 'spam'"),
        ({"device": "tpu"}, "device: expected 'cpu' or 'cuda', got 'tpu'"),
    ],
)
def test_bad_input(options: dict[str, str], words: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=words):
        runner.run(**options, out=tmp_path)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_slow_contestants_take_part_in_full_runs() -> None:
    full = dataclasses.replace(BRIEF, slow_too=True)
    result = measure.measure(toy.case(contestants=(toy.SLOW,)), stage(effort=full))
    assert statuses(result) == {"slow peer": "measured"}
