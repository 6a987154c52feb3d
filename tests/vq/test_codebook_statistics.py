"""codebook_statistics and ema_update_: counts, sums, the update written out."""

import pytest
import torch
from torch import Tensor

from kexue_kernels import vq
from kexue_kernels.vq import blocked_codebook_statistics, reference
from tests.vq.cases import DTYPES, check_statistics, generator

BACKENDS = ["reference", "cpu"]


def draw(N: int, K: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = generator(0)
    return torch.randn(N, d, generator=g).to(dtype), torch.randint(-1, K, (N,), generator=g)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (300, 7, 5), (40, 100, 3), (1000, 2, 17)], ids=str)
def test_blocked_pytorch(
    sizes: tuple[int, int, int], dtype: torch.dtype, without_extension: None, poisoned: None
) -> None:
    x, indices = draw(*sizes, dtype)
    check_statistics(x, indices, sizes[1], "cpu")
    check_statistics(x.mT.contiguous().mT, indices.int(), sizes[1], "cpu")


def test_blocks_of_any_size(without_extension: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked_codebook_statistics, "_ROWS", 7)
    check_statistics(*draw(100, 9, 4), 9, "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    x = torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8]])
    indices = torch.tensor([2, -1, 0, 2])
    counts, sums = vq.codebook_statistics(x, indices, 4, backend=backend)
    assert counts.tolist() == [1, 0, 2, 0]
    assert sums.tolist() == [[5, 6], [0, 0], [8, 10], [0, 0]]
    assert counts.dtype == torch.int64
    assert sums.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_axes_and_gradients(backend: str) -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    indices = torch.tensor([[0, 1, 1], [2, -1, 0]])
    counts, sums = vq.codebook_statistics(x, indices, 3, backend=backend)
    assert counts.tolist() == [2, 2, 1]
    assert not sums.requires_grad
    torch.testing.assert_close(sums[0], (x[0, 0] + x[1, 2]).detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("N", "d"), [(0, 3), (4, 0), (0, 0)])
def test_zero_sizes(backend: str, N: int, d: int) -> None:
    indices = torch.ones(N, dtype=torch.int64)
    counts, sums = vq.codebook_statistics(torch.randn(N, d), indices, 2, backend=backend)
    assert counts.tolist() == [0, N]
    assert torch.equal(sums, torch.zeros(2, d))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_index_at_all(backend: str) -> None:
    counts, sums = vq.codebook_statistics(
        torch.full((3, 2), torch.nan), torch.full((3,), -1), 2, backend=backend
    )
    assert counts.tolist() == [0, 0]
    assert torch.equal(sums, torch.zeros(2, 2))


def test_sums_are_better_than_a_running_one() -> None:
    """10^5 equal rows: float32 additions one after the other would be off by much more."""
    x = torch.full((100_000, 2), 0.1)
    _, sums = vq.codebook_statistics(x, torch.zeros(100_000, dtype=torch.int64), 1)
    exact = 100_000 * torch.tensor(0.1).double()
    assert (sums.double() - exact).abs().max() <= 1e-5 * exact


def state(K: int = 5, d: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = generator(1)
    codebook = torch.randn(K, d, generator=g)
    size = torch.rand(K, generator=g) + 0.1
    return [codebook.to(dtype), size, codebook * size[:, None]]


def written_out(
    state: list[Tensor], x: Tensor, indices: Tensor, decay: float, eps: float
) -> list[Tensor]:
    """The update in Python's own numbers."""
    codebook, size, total = (t.double().clone() for t in state)
    for k in range(codebook.shape[0]):
        chosen = x.double()[indices == k]
        size[k] = decay * size[k] + (1 - decay) * len(chosen)
        total[k] = decay * total[k] + (1 - decay) * chosen.sum(0)
    n = size.sum().item()
    for k in range(codebook.shape[0]):
        smoothed = (size[k] + eps) / (n + codebook.shape[0] * eps) * n
        codebook[k] = total[k] / smoothed
    return [codebook, size, total]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize("decay", [0.0, 0.8, 0.99])
def test_ema_update_written_out(decay: float, eps: float, backend: str) -> None:
    running = state()
    x, indices = draw(40, 5, 3)
    expected = written_out(running, x, indices, decay, eps)
    returned = vq.ema_update_(*running, x, indices, decay=decay, eps=eps, backend=backend)
    assert returned is running[0]
    for found, exact in zip(running, expected, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ema_update_of_a_half_codebook(dtype: torch.dtype) -> None:
    running = state(dtype=dtype)
    x, indices = draw(40, 5, 3, dtype)
    expected = written_out(running, x, indices, 0.9, 1e-5)
    vq.ema_update_(*running, x, indices, decay=0.9)
    assert [t.dtype for t in running] == [dtype, torch.float32, torch.float32]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(running[0].double(), expected[0], rtol=2 * eps, atol=1e-6)


def test_ema_update_in_double_and_without_rows() -> None:
    running = [t.double() for t in state()]
    before = [t.clone() for t in running]
    x, indices = torch.randn(0, 3, dtype=torch.float64), torch.empty(0, dtype=torch.int64)
    vq.ema_update_(*running, x, indices, decay=0.5)
    for found, exact in zip(running, written_out(before, x, indices, 0.5, 1e-5), strict=True):
        torch.testing.assert_close(found, exact)


def test_codes_that_nothing_was_counted_for_stay() -> None:
    codebook, size, total = torch.randn(2, 3), torch.zeros(2), torch.zeros(2, 3)
    before = codebook.clone()
    empty = torch.empty(0, dtype=torch.int64)
    vq.ema_update_(codebook, size, total, torch.randn(0, 3), empty, decay=0.5)
    assert torch.equal(codebook, before)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_lazily_negated_tensors_are_updated(backend: str) -> None:
    x, indices = draw(40, 5, 3)
    expected = written_out(state(), x, indices, 0.9, 1e-5)
    running = [torch._neg_view(-t) for t in state()]
    vq.ema_update_(*running, x, indices, decay=0.9, backend=backend)
    for found, exact in zip(running, expected, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


def test_the_reference_updates_negated_halves() -> None:
    x, indices = draw(40, 5, 3)
    codebook, *running = state(dtype=torch.float16)
    negated = [torch._neg_view(-codebook), *(t.clone() for t in running)]
    vq.ema_update_(codebook, *running, x, indices, decay=0.9, backend="reference")
    vq.ema_update_(*negated, x, indices, decay=0.9, backend="reference")
    assert torch.equal(negated[0].resolve_neg(), codebook)


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_an_update_without_channels_counts(backend: str) -> None:
    size = torch.tensor([1.0, 1.0])
    empty, rows = torch.empty(2, 0), torch.empty(3, 0)
    indices = torch.tensor([0, 0, -1])
    vq.ema_update_(empty, size, empty.clone(), rows, indices, decay=0.5, backend=backend)
    assert size.tolist() == [1.5, 0.5]


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_tensors_are_refused_before_anything_is_written(which: int, backend: str) -> None:
    running = state()
    with torch.inference_mode():
        running[which] = running[which].clone()
        vq.ema_update_(*state(), *draw(4, 5, 3), decay=0.5, backend=backend)
    before = [t.clone() for t in running]
    name = ("codebook", "cluster_size", "embed_sum")[which]
    with pytest.raises(ValueError, match=rf"{name}: .* got one made in inference mode"):
        vq.ema_update_(*running, *draw(4, 5, 3), decay=0.5, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(running, before, strict=True))


def test_a_codebook_is_not_its_own_sum() -> None:
    codebook, size, _ = state()
    before = codebook.clone()
    with pytest.raises(ValueError, match=r"embed_sum: .* got codebook itself"):
        vq.ema_update_(codebook, size, codebook, *draw(4, 5, 3), decay=0.5)
    assert torch.equal(codebook, before)


def test_nothing_is_written_where_an_argument_is_wrong() -> None:
    running = state()
    before = [t.clone() for t in running]
    x, _ = draw(4, 5, 3)
    with pytest.raises(ValueError, match="indices: expected values from -1 to 4, got 5"):
        vq.ema_update_(*running, x, torch.tensor([0, 1, 2, 5]), decay=0.5)
    assert all(torch.equal(a, b) for a, b in zip(running, before, strict=True))


def test_reference_update_is_the_same() -> None:
    first, second = state(), state()
    x, indices = draw(40, 5, 3)
    vq.ema_update_(*first, x, indices, decay=0.9, backend="reference")
    reference.ema_update_(*second, x, indices, decay=0.9)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_parameter_is_updated_in_place() -> None:
    running = state()
    codebook = torch.nn.Parameter(running[0])
    x, indices = draw(40, 5, 3)
    vq.ema_update_(codebook, *running[1:], x.requires_grad_(), indices, decay=0.9)
    assert codebook.is_leaf
    assert codebook.grad_fn is None
