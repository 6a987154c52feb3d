"""`bench`: hands its options to the benchmark suite and prints what comes back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from kexue_kernels import benchmarks
from kexue_kernels.cli import app


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the suite, replaced by one that measures nothing, was asked for."""
    asked: list[dict[str, Any]] = []

    def fake(family: str | None, **options: Any) -> dict[str, Any]:
        options.pop("console").print("at work")
        asked.append({"family": family, **options})
        return {"cases": []}

    monkeypatch.setattr(benchmarks, "run", fake)
    return asked


def test_defaults(calls: list[dict[str, Any]]) -> None:
    result = run()
    assert result.exit_code == 0
    nothing = dict.fromkeys(("family", "device", "out", "time_limit", "again"))
    assert calls == [{**nothing, "quick": False}]
    assert "at work" in result.stdout


def test_every_option(calls: list[dict[str, Any]]) -> None:
    options = ["--quick", "--device", "cpu", "--out", "results", "--time-limit", "30.5", "--json"]
    result = run("scan", *options, "--again", "[1, 4, 8]")
    assert result.exit_code == 0
    assert calls == [
        {
            "family": "scan",
            "quick": True,
            "device": "cpu",
            "out": Path("results"),
            "time_limit": 30.5,
            "again": "[1, 4, 8]",
        }
    ]
    assert json.loads(result.stdout) == {"cases": []}
    assert "at work" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["attention"], ["FAMILY", "attention", "scan"]),
        (["--device", "tpu"], ["--device", "tpu", "cpu", "cuda"]),
        (["--time-limit", "-1"], ["--time-limit", "0"]),
    ],
)
def test_unknown_names(calls: list[Any], arguments: list[str], words: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert not calls
    for word in words:
        assert word in result.stderr


def test_no_gpu(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("--device", "cuda")
    assert result.exit_code == 2
    assert not calls
    assert "PyTorch sees no GPU" in result.stderr
