"""The end-to-end cases, on a model small enough for a test: all contestants run and are right."""

from collections.abc import Iterator

import pytest
import torch

from kexue_kernels.benchmarks import check, deepseek
from kexue_kernels.benchmarks.case import Bound, Case
from kexue_kernels.integrations.latent_cache import LatentLayer
from tests.benchmarks.toy import CPU

pytest.importorskip("transformers")

SIZES = {
    "HIDDEN": 16, "INNER": 24, "HEADS": 2, "VOCABULARY": 50,
    "DQ": 12, "DC": 16, "DK": 8, "DR": 4, "DV": 8,
}  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in SIZES.items():
        monkeypatch.setattr(deepseek, name, value)
    deepseek._model.cache_clear()
    yield
    deepseek._model.cache_clear()


def check_contestants(case: Case) -> None:
    inputs, grad = case.make(CPU), case.cotangent(CPU)
    expected = check.expect(case, inputs, grad)
    for contestant in case.contestants:
        assert contestant.absence() is None
        bound = Bound(contestant, case.direction, inputs, grad)
        for _ in range(2):  # a call leaves nothing behind
            results = bound.results()
            assert results["output"].shape == case.output_shape
            assert check.judge(results, expected)[1] == "", contestant.name


def test_generation() -> None:
    case = deepseek.generation(5, 3, 2, torch.float32)
    assert [c.name for c in case.contestants] == ["kexue patched", "Transformers"]
    check_contestants(case)


@pytest.mark.parametrize("kind", ["prefill", "training"])
def test_attention(kind: str) -> None:
    case = deepseek.attention(kind, 6, torch.float32)
    names = [c.name for c in case.contestants]
    assert names == ["kexue patched", "Transformers", "Transformers eager"]
    check_contestants(case)


def test_only_ours_keeps_its_cache_in_pages() -> None:
    case = deepseek.generation(5, 3, 2, torch.float32)
    kinds = []
    for contestant in case.contestants:
        embeddings, cache = contestant.prepare(case.make(CPU))
        contestant.load()(embeddings, cache)
        assert cache.get_seq_length() == 5
        kinds.append({isinstance(layer, LatentLayer) for layer in cache.layers})
    assert kinds == [{True}, {False}]


def test_work_is_counted() -> None:
    case = deepseek.generation(6, 2, 3, torch.float32)
    attention = 16 * 12 + 12 * 2 * 12 + 16 * 20 + 2 * (16 * 16 + 8 * 16)
    weights = 3 * (attention + 3 * 16 * 24) + 50 * 16
    assert case.bytes == 2 * 4 * (weights + 3 * 7 * 20)
    assert case.flops == 2 * 2 * (weights + 3 * 7 * 2 * 36)
    goals = [goal.text for case in deepseek.cases(CPU) for goal in case.goals]
    assert goals == ["at least 5x Transformers"]
