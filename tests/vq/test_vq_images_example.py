"""examples/vq_images.py: a short run of the whole program."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_a_short_run(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    command = [str(ROOT / "examples" / "vq_images.py"), "--steps", "2", "--out", str(tmp_path)]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "vq_images.json").read_text())
    assert list(numbers["runs"]) == ["straight through", "rotation", "SimVQ"]
    for run in numbers["runs"].values():
        assert [point["step"] for point in run["points"]] == [0, 1, 2]
        for point in run["points"]:
            assert 0 < point["usage"] <= 1
            assert 1 <= point["perplexity"] <= 1024
            assert math.isfinite(point["decibel"])
    assert "usage of the codebook" in numbers["verdict"]
    assert numbers["verdict"] in " ".join(done.stdout.split())
    for name in ("vq_images.png", "vq_images_usage.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
