"""nearest_codebook's contract: the float64 argmin, edge cases, memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kexue_kernels import vq
from kexue_kernels.vq import blocked_nearest_codebook
from tests.vq.cases import EVERY_KIND, KINDS, METRICS, SHAPES, Data, check_nearest, nearest

BACKENDS = ["reference", "cpu"]
DOUBLES = [Data(kind, dtype=torch.float64) for kind in KINDS]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", EVERY_KIND + SHAPES + DOUBLES, ids=str)
def test_reference_is_the_definition(case: Data, metric: str) -> None:
    check_nearest(case, metric, "reference")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", EVERY_KIND + SHAPES, ids=str)
def test_blocked_pytorch(case: Data, metric: str, without_extension: None, poisoned: None) -> None:
    check_nearest(case, metric, "cpu")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["random", "duplicated", "bisector", "zeros", "broken"])
def test_blocks_of_any_size(
    kind: str, metric: str, without_extension: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked_nearest_codebook, "_CODES", 5)
    monkeypatch.setattr(blocked_nearest_codebook, "_ELEMENTS", 30)
    monkeypatch.setattr(blocked_nearest_codebook, "_PAIRS", 7)
    check_nearest(Data(kind, N=40, K=23, d=5), metric, "cpu")


def test_most_rows_are_certified(without_extension: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one of random rows is left to the comparison by the definition."""
    monkeypatch.setattr(blocked_nearest_codebook, "_compare", None)
    for metric in METRICS:
        for kind in ("random", "offset"):
            check_nearest(Data(kind, N=500, K=200, d=16), metric, "cpu")


def test_by_hand() -> None:
    codebook = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    x = torch.tensor([[2.0, 0.5], [0.0, 0.9], [-1.0, -1.0]])
    for backend in BACKENDS:
        found = [vq.nearest_codebook(x, codebook, metric=m, backend=backend) for m in METRICS]
        assert [t.tolist() for t in found] == [[1, 2, 0], [1, 2, 0], [1, 2, 0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_a_row_of_zeros(backend: str, metric: str) -> None:
    codebook = torch.tensor([[torch.nan, 0], [1, 2], [0, 0], [-1, -1]])
    expected = {"l2": 2, "cosine": 1, "dot": 1}[metric]
    found = vq.nearest_codebook(torch.zeros(2), codebook, metric=metric, backend=backend)
    assert found.item() == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_equal_codes_tie_wherever_they_lie(backend: str, metric: str) -> None:
    g = torch.Generator().manual_seed(0)
    for K, d in ((50, 1), (300, 7), (129, 40), (2000, 3)):
        code = torch.randn(d, generator=g)
        codebook = code.expand(K, d)
        x = torch.randn(9, d, generator=g)
        found = vq.nearest_codebook(x, codebook, metric=metric, backend=backend)
        assert torch.equal(found, torch.zeros(9, dtype=torch.int64))
        last = vq.nearest_codebook(
            x, torch.cat([codebook[:0], codebook]), metric=metric, backend=backend
        )
        assert torch.equal(last, found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_finite_code(backend: str) -> None:
    codebook = torch.tensor([[torch.inf, 1], [1, torch.nan]])
    found = vq.nearest_codebook(torch.randn(3, 2), codebook, backend=backend)
    assert found.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("x", "codebook"),
    [
        ((0, 4), (3, 4)),
        ((2, 0, 4), (3, 4)),
        ((3, 0), (2, 0)),
        ((0, 5, 4), (0, 3, 4)),
        ((4,), (1, 4)),
    ],
    ids=str,
)
def test_zero_sizes(backend: str, x: tuple[int, ...], codebook: tuple[int, ...]) -> None:
    found = vq.nearest_codebook(torch.randn(x), torch.randn(codebook), backend=backend)
    assert found.dtype == torch.int64
    assert torch.equal(found, torch.zeros(x[:-1], dtype=torch.int64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
def test_heads_are_searched_alone(backend: str, metric: str) -> None:
    x, codebook = torch.randn(3, 4, 5, 6), torch.randn(3, 9, 6)
    found = vq.nearest_codebook(x, codebook, metric=metric, backend=backend)
    for h in range(3):
        expected = nearest(x[h].reshape(20, 6), codebook[h], metric).view(4, 5)
        assert torch.equal(found[h], expected)


def _strided(x: Tensor) -> list[Tensor]:
    """The same numbers, differently laid out."""
    wide = torch.stack([x, x + 1], -1)
    return [x.mT.contiguous().mT, wide[..., 0], torch.cat([x, x])[: x.shape[0]], x.flip(0).flip(0)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str) -> None:
    x, codebook = torch.randn(10, 6), torch.randn(7, 6)
    expected = nearest(x, codebook, "l2")
    for a in _strided(x):
        for b in _strided(codebook):
            assert torch.equal(vq.nearest_codebook(a, b, backend=backend), expected)
    channels_first = torch.randn(2, 6, 5)
    rows = channels_first.transpose(1, 2)
    found = vq.nearest_codebook(rows, codebook, backend=backend)
    assert torch.equal(found.flatten(), nearest(rows.reshape(10, 6), codebook, "l2"))
    same = torch.randn(6).expand(4, 6)
    found = vq.nearest_codebook(same, codebook, backend=backend)
    assert torch.equal(found, nearest(same, codebook, "l2"))


def test_fast_is_close(without_extension: None) -> None:
    """No promise for near ties; elsewhere the same, and broken rows and codes are told apart."""
    x, codebook = Data("random", N=400, K=100).make()
    found = vq.nearest_codebook(x, codebook, precision="fast")
    distance = torch.cdist(x.double(), codebook.double())
    chosen = distance.gather(1, found[:, None])[:, 0]
    assert (chosen - distance.amin(1)).max() < 1e-5
    for kind in ("broken", "huge", "zeros"):
        for metric in METRICS:
            x, codebook = Data(kind).make()
            found = vq.nearest_codebook(x, codebook, metric=metric, precision="fast")
            assert torch.equal(found < 0, ~x.isfinite().all(1))
            assert codebook[found[found >= 0]].isfinite().all()


def test_no_gradient_is_asked_for() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    found = vq.nearest_codebook(x, torch.randn(5, 3, requires_grad=True))
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("N", "K", "d"), [(1 << 14, 1 << 14, 2), (1 << 17, 3, 32), (3, 1 << 17, 32)]
)
def test_memory_beside_the_inputs(N: int, K: int, d: int) -> None:
    """No allocation is of the size of all scores, or of the inputs in float64."""
    x, codebook = torch.randn(1, N, d), torch.randn(1, K, d)
    given = {t.untyped_storage().data_ptr() for t in (x, codebook)}
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given:
                    largest = max(largest, t.untyped_storage().nbytes())
            return out

    with Watch():
        blocked_nearest_codebook.search(x, codebook, "l2", "exact")
    assert 0 < largest <= 9 << 20


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40)),
    kind=st.sampled_from(sorted(KINDS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    metric=st.sampled_from(METRICS),
)
def test_any_case_on_cpu(sizes, kind, dtype, metric) -> None:
    check_nearest(Data(kind, *sizes, dtype), metric, "cpu")


@pytest.mark.parametrize("small", [1e-14, 1e-16, 1e-30])
def test_codes_that_float64_cannot_tell_apart(small: float) -> None:
    """The distance of a far row to codes so near each other rounds: the lowest index of equals."""
    x, codebook = 100 + torch.randn(20, 5), small * torch.randn(40, 5)
    for backend in BACKENDS:
        found = vq.nearest_codebook(x, codebook, backend=backend)
        assert torch.equal(found, nearest(x, codebook, "l2"))
