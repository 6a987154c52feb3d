"""The end-to-end cases, on a model small enough for a test: both contestants run and are right."""

from collections.abc import Iterator

import pytest
import torch

from kexue_kernels.benchmarks import check, mamba
from kexue_kernels.benchmarks.case import Bound
from tests.benchmarks.toy import CPU

SIZES = {"HIDDEN": 16, "INNER": 32, "STATE": 4, "RANK": 1, "VOCABULARY": 50}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in SIZES.items():
        monkeypatch.setattr(mamba, name, value)
    mamba._model.cache_clear()
    yield
    mamba._model.cache_clear()


@pytest.mark.parametrize("kind", ["prefill", "generation", "training"])
def test_contestants_are_right(kind: str, tiny: None) -> None:
    run = {"prefill": mamba._prefill, "generation": mamba._generate, "training": mamba._train}
    case = mamba._case(kind, (2, 6, 2), torch.float32, run[kind])
    inputs, grad = case.make(CPU), case.cotangent(CPU)
    expected = check.expect(case, inputs, grad)
    assert {contestant.name for contestant in case.contestants} == {
        "kexue patched",
        "Transformers",
    }
    for contestant in case.contestants:
        assert contestant.absence() is None
        results = Bound(contestant, case.direction, inputs, grad).results()
        assert results["output"].shape == case.output_shape
        assert check.judge(results, expected)[1] == "", contestant.name


def test_only_the_last_token_of_a_prefill_gets_logits() -> None:
    prefill, generation, _ = mamba.cases(CPU)
    head = 2 * mamba.VOCABULARY * mamba.HIDDEN
    assert prefill.flops == 2 * 2048 * 24 * mamba.LAYER + head
    assert generation.flops == 32 * (2 * 24 * mamba.LAYER + head)


def test_the_patched_model_is_patched() -> None:
    ours, theirs = mamba.cases(CPU)[0].contestants
    assert (ours.ours, theirs.ours) == (True, False)
