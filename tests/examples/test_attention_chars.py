"""examples/attention_chars.py: a short run of the whole program, and what is cached."""

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
CACHED = {"MHA": 4096, "GQA": 1024, "MQA": 512, "MLA": 1280}  # bytes a token, four layers


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import attention_chars_model

    return attention_chars_model


def test_a_short_run(tmp_path: Path) -> None:
    command = [str(EXAMPLES / "attention_chars.py"), "--steps", "1", "--seeds", "1"]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, "--characters", "3", "--windows", "4", "--out", str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = json.loads((tmp_path / "attention_chars.json").read_text())
    assert {row["kind"]: row["cache_bytes"] for row in numbers["results"]} == CACHED
    assert all(3 < row["bits"] < 8 for row in numbers["results"])
    assert (tmp_path / "attention_chars.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", CACHED)
def test_no_character_sees_those_after_it(parts: ModuleType, kind: str) -> None:
    torch.manual_seed(0)
    model = parts.CharAttention(kind)
    tokens = torch.randint(128, (2, 12))
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 128
    with torch.no_grad():
        found, other = model(tokens), model(changed)
    torch.testing.assert_close(found[:, :7], other[:, :7])
    assert not torch.allclose(found[:, 7:], other[:, 7:])


def test_positions_turn_pairs_relatively(parts: ModuleType) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 16, dtype=torch.float64)
    q, k = parts.rotated(x.expand(1, 1, 9, 16)), parts.rotated(y.expand(1, 1, 9, 16))
    scores = (q @ k.mT)[0, 0]
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=1e-5, atol=1e-5)
