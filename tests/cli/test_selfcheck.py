"""`selfcheck`: it passes what is right, and catches what is not."""

import json
import time
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from kexue_kernels import dispatch, families, launchers
from kexue_kernels.cli import app
from kexue_kernels.cli.checking import Checker
from kexue_kernels.cli.selfcheck import _device
from kexue_kernels.cli.selfcheck_cases import Case, cases
from kexue_kernels.dispatch import BackendStatus


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["selfcheck", *arguments])


def checked(*arguments: str) -> tuple[int, dict[str, Any]]:
    result = run(*arguments, "--json")
    return result.exit_code, json.loads(result.stdout)


@pytest.fixture
def cpu_launcher() -> Any:
    return launchers.launcher_of("scan", "linear_scan", "cpu", torch.zeros(1, 1, 1))


def test_every_op_of_every_family_has_cases() -> None:
    for family in families.names():
        assert {case.op for case in cases(family)} == set(families.ops(family))


def test_the_cases_reach_every_option() -> None:
    made = [case.make() for case in cases("scan") if case.op == "linear_scan"]
    dtypes = {inputs["b"].dtype for inputs in made}
    assert dtypes == {torch.float32, torch.bfloat16, torch.float16, torch.complex64}
    assert any(inputs["a"].ndim == 1 for inputs in made)
    assert any("cu_seqlens" in inputs for inputs in made)
    assert {"initial_state" in inputs for inputs in made} == {True, False}
    assert any(not inputs["b"].is_contiguous() for inputs in made)
    assert any("reverse" in case.name for case in cases("scan"))


def test_the_cases_reach_every_option_of_the_selective_scan() -> None:
    made = [case.make() for case in cases("scan") if case.op == "selective_scan"]
    assert {x["u"].dtype for x in made} == {torch.float32, torch.bfloat16, torch.float16}
    assert {x["A"].dtype for x in made} == {torch.float32, torch.complex64}
    assert {x["B"].ndim for x in made} == {2, 3, 4}
    assert any("cu_seqlens" in x for x in made)
    assert {"initial_state" in x for x in made} == {True, False}
    assert any(not x["u"].is_contiguous() for x in made)


def linear(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [result for result in report["results"] if result["op"] == "linear_scan"]


def test_right_kernels_pass() -> None:
    began = time.process_time()
    status, report = checked("--backend", "cpu")
    assert time.process_time() - began < 120  # of all threads: about a minute of two cores
    assert status == 0
    assert report["ok"]
    assert len(report["results"]) == sum(len(cases(family)) for family in families.names())
    assert all(result["ok"] and result["backend"] == "cpu" for result in report["results"])
    assert all(result["error"] <= result["allowed"] for result in report["results"])


def test_triton_passes() -> None:
    """In the interpreter (see conftest.py), without the long cases, which it says."""
    status, report = checked("--backend", "triton")
    assert (status, report["ok"]) == (0, True)
    every = [(family, case) for family in families.names() for case in cases(family)]
    own = [
        case.interpreted
        for family, case in every
        if launchers.implements(family, case.kernels or case.op, "triton")
    ]
    assert len(report["results"]) == sum(own) > 50
    skipped = [(each["backend"], each["cases"]) for each in report["skipped"]]
    plain = ("fsq", "merge_attention_states", "monarch_to_dense", "project_to_monarch")
    assert skipped == [("triton", "long"), *(("triton", op) for op in plain)]


def test_blocked_pytorch_passes(without_extension: None) -> None:
    status, report = checked("scan", "--backend", "cpu")
    assert (status, report["ok"]) == (0, True)


def test_one_wrong_value_is_a_miss(cpu_launcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu_launcher.forward

    def wrong(*arguments: Any) -> Any:
        h, final_state = right(*arguments)
        h.view(-1)[-1] += 0.1 * h.abs().max()
        return h, final_state

    monkeypatch.setattr(cpu_launcher, "forward", wrong)
    status, report = checked("scan", "--backend", "cpu")
    assert status == 1
    assert not report["ok"]
    missed = [result for result in report["results"] if not result["ok"]]
    assert missed == linear(report)
    text = run("scan", "--backend", "cpu")
    assert text.exit_code == 1
    assert "missed" in text.stdout


def test_one_wrong_gradient_is_a_miss(cpu_launcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu_launcher.backward

    def wrong(*arguments: Any) -> Any:
        grad_a, grad_b, grad_initial = right(*arguments)
        grad_b.view(-1)[0] = float("nan")
        return grad_a, grad_b, grad_initial

    monkeypatch.setattr(cpu_launcher, "backward", wrong)
    status, report = checked("scan", "--backend", "cpu")
    assert status == 1
    assert {result["worst"] for result in linear(report)} == {"grad b"}


def test_a_kernel_that_raises_is_a_miss(cpu_launcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("the launch [failed]")

    monkeypatch.setattr(cpu_launcher, "forward", broken)
    status, report = checked("scan", "--backend", "cpu")
    assert status == 1
    assert all("the launch [failed]" in result["failure"] for result in linear(report))
    monkeypatch.setenv("COLUMNS", "200")
    assert "the launch [failed]" in run("scan", "--backend", "cpu").stdout


def test_unavailable_backends_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def off() -> BackendStatus:
        return BackendStatus(False, "switched off for a test")

    monkeypatch.setattr(dispatch, "_STATUS", dict.fromkeys(dispatch.NAMES, off))
    status, report = checked()
    assert status == 0
    assert report["results"] == []
    assert [entry["backend"] for entry in report["skipped"]] == ["cpu", "triton", "cuda"]
    assert {entry["reason"] for entry in report["skipped"]} == {"switched off for a test"}
    text = run("--backend", "cuda")
    assert text.exit_code == 1  # what was asked for could not be checked
    assert "switched off for a test" in text.stdout


def test_triton_is_checked_on_cpu_only_when_interpreting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _device("triton") == "cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert _device("triton") == "cuda"
    if not torch.cuda.is_available():
        status, report = checked("--backend", "triton")
        assert status == 1
        assert "no GPU" in report["skipped"][0]["reason"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["attention"], ["FAMILY", "attention", "scan"]),
        (["--backend", "metal"], ["--backend", "metal", "cpu, triton, cuda"]),
    ],
)
def test_unknown_names(arguments: list[str], words: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    for word in words:
        assert word in result.stderr


# ---- the check itself, on an op made up here


def made_up(call: Any) -> Case:
    """y = 2 x and how many there are, in float16."""
    values = torch.linspace(-3, 3, 64).to(torch.float16)
    return Case("double", "made up", lambda: {"x": values}, call, ("x",))


def double(inputs: Any, factor: float = 2.0, extra: int = 0, dtype: Any = None) -> Any:
    y = inputs["x"] * factor
    return {"y": y if dtype is None else y.to(dtype), "n": torch.tensor(y.numel() + extra)}


def test_exact_answers_have_no_error() -> None:
    result = Checker(made_up(lambda inputs, backend: double(inputs))).check("cpu", "cpu")
    assert result.ok
    assert result.error == 0


@pytest.mark.parametrize(
    ("wrong", "worst"),
    [({"factor": 2.02}, "y"), ({"extra": 1}, "n"), ({"dtype": torch.float32}, "y")],
)
def test_wrong_values_integers_and_dtypes(wrong: dict[str, Any], worst: str) -> None:
    case = made_up(lambda inputs, backend: double(inputs, **(wrong if backend == "cpu" else {})))
    result = Checker(case).check("cpu", "cpu")
    assert not result.ok
    assert result.worst == worst
