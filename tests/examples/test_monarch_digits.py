"""examples/monarch_digits.py: a short run of the whole program, and its counts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def test_a_short_run(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    command = [str(EXAMPLES / "monarch_digits.py"), "--epochs", "1", "--seeds", "1"]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, "--blocks", "16,32", "--out", str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = json.loads((tmp_path / "monarch_digits.json").read_text())
    results = {(row["kind"], row["size"]): row for row in numbers["results"]}
    monarchs = {kind for kind, size in results if size in (16, 32)} - {"dense"}
    assert monarchs == {"scratch", "projected", "finetuned"}
    assert all(0 < row["accuracy"] <= 1 for row in results.values())
    dense = results["dense", 1024]
    for nblocks in (16, 32):
        for kind in monarchs:
            saved = 1024**2 - 2 * 1024**2 // nblocks
            row = results[kind, nblocks]
            assert row["parameters"] == dense["parameters"] - saved
            assert row["flops"] == dense["flops"] - 2 * saved
        assert 0 < results["projected", nblocks]["relative_error"] < 1
    assert "finetuned" in done.stdout
    assert (tmp_path / "monarch_digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import monarch_digits_model

    return monarch_digits_model


def test_no_held_out_image_is_trained_on(parts: ModuleType) -> None:
    pytest.importorskip("sklearn")
    digits = parts.load_digits()
    assert len(digits.train) == len(digits.train_classes) == 1000
    assert len(digits.held_out) == len(digits.held_out_classes) == 797
    assert not torch.cdist(digits.held_out, digits.train).eq(0).any()
    assert digits.held_out_classes.bincount(minlength=10).min() > 50


def test_counts_written_out(parts: ModuleType) -> None:
    model = parts.perceptron(32, nblocks=4)  # w1 and w2 [4, 8, 8]
    weights = 64 * 32 + 2 * 4 * 8 * 8 + 32 * 10
    assert parts.parameters(model) == weights + 32 + 32 + 10
    assert parts.flops(model) == 2 * weights
