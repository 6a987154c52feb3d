"""examples/char_lm.py: a short run of the whole program, and the parts of its model."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
WITHOUT_MATPLOTLIB = "import sys; sys.modules['matplotlib'] = None; sys.path.insert(0, {path!r})\n"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # tests may run side by side
    return subprocess.run(
        [sys.executable, *command],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def options(out: Path) -> list[str]:
    return ["--characters", "60", "--out", str(out)]


def check_numbers(folder: Path) -> None:
    numbers = json.loads((folder / "char_lm.json").read_text())
    assert all(math.isfinite(bits) for _, bits in numbers["train"] + numbers["held_out"])
    assert 0 < numbers["held_out_bits"] < 10
    assert numbers["held_out_bits"] == numbers["held_out"][-1][1]
    assert 3 < numbers["unigram_bits"] < 6
    assert numbers["training_tokens"] > 0
    assert numbers["sample"].startswith("The with statement")
    assert len(numbers["sample"]) == len("The with statement") + 60
    ours, reference = numbers["speeds"][numbers["backend"]], numbers["speeds"]["reference"]
    assert ours["bits"] == pytest.approx(reference["bits"], rel=1e-4)
    assert min(ours["tokens_per_second"], reference["tokens_per_second"]) > 0


def test_a_short_run(tmp_path: Path) -> None:
    done = run(str(EXAMPLES / "char_lm.py"), "--seconds", "5", *options(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    check_numbers(tmp_path)
    assert (tmp_path / "char_lm.png").read_bytes().startswith(b"\x89PNG")
    for words in ("held out", "tokens/s", "reference", "unigram", "sampled"):
        assert words in done.stdout


def test_without_matplotlib_there_are_still_numbers(tmp_path: Path) -> None:
    program = WITHOUT_MATPLOTLIB.format(path=str(EXAMPLES)) + (
        "import typer, char_lm; typer.run(char_lm.main)"
    )
    done = run("-c", program, "--seconds", "0.1", "--seed", "3", *options(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    check_numbers(tmp_path)
    assert "matplotlib is not installed" in done.stdout
    assert not (tmp_path / "char_lm.png").exists()


@pytest.mark.gpu
def test_a_short_run_on_a_gpu(tmp_path: Path) -> None:
    program = str(EXAMPLES / "char_lm.py")
    done = run(program, "--seconds", "5", "--device", "cuda", *options(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    check_numbers(tmp_path)


def test_an_unknown_backend_is_an_error(tmp_path: Path) -> None:
    program = str(EXAMPLES / "char_lm.py")
    done = run(program, "--backend", "gpu", "--seconds", "0.1", *options(tmp_path))
    assert done.returncode == 1
    assert "backend: expected one of" in done.stdout + done.stderr


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import char_lm

    return char_lm


def test_no_held_out_paragraph_is_in_the_training_text(parts: ModuleType) -> None:
    corpus = parts.load_corpus(torch.device("cpu"))
    assert len(corpus.held_out) == pytest.approx(len(corpus.train) / 9, rel=1e-3)
    train, held_out = (parts.decode(tokens.tolist()) for tokens in corpus)
    learned = set(train.split("\n\n"))
    # the cut goes through the first of these paragraphs
    assert not learned.intersection(p for p in held_out.split("\n\n")[1:] if "?" not in p)


def test_states_carry_the_model_over_a_cut(parts: ModuleType) -> None:
    torch.manual_seed(0)
    model = parts.CharLM(dim=8, state_dim=6, layers=2)
    tokens = torch.randint(128, (3, 40))
    whole, _ = model(tokens)
    first, states = model(tokens[:, :17])
    second, _ = model(tokens[:, 17:], states)
    assert_close(torch.cat((first, second), 1), whole)


def test_held_out_bits_are_those_of_one_long_sequence(parts: ModuleType) -> None:
    torch.manual_seed(0)
    model = parts.CharLM(dim=8, state_dim=6, layers=2)
    tokens = torch.randint(128, (100,))
    corpus = parts.Corpus(tokens, tokens)
    logits, _ = model(tokens[None, :-1])
    expected = torch.nn.functional.cross_entropy(logits[0], tokens[1:]).item() / math.log(2)
    assert parts.held_out_bits(model, corpus, length=7) == pytest.approx(expected, rel=1e-5)


def test_unigram_bits(parts: ModuleType) -> None:
    train, held_out = torch.zeros(128, dtype=torch.long), torch.zeros(5, dtype=torch.long)
    expected = -math.log2(129 / 256)  # one more of each character was counted
    assert parts.unigram_bits(parts.Corpus(train, held_out)) == pytest.approx(expected)


def test_text_survives_encoding_and_control_characters_do_not_reach_the_screen(
    parts: ModuleType,
) -> None:
    text = "def f(x):\n    return x\n"
    assert parts.decode(parts.encode(text, torch.device("cpu")).tolist()) == text
    assert parts.decode(parts.encode("β", torch.device("cpu")).tolist()) == "?"
    assert parts.decode([27, 65, 0, 10]) == "?A?\n"


def test_the_learning_rate_rises_then_falls(parts: ModuleType) -> None:
    rates = [parts.schedule(step / 100) for step in range(101)]
    peak = rates.index(max(rates))
    assert 0 < peak < 10
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < rates[-1] < 0.02
    assert parts.schedule(1.5) == rates[-1]
