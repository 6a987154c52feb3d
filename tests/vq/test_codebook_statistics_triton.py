"""codebook_statistics and ema_update_ in Triton's interpreter: short chunks, all kinds of runs."""

import itertools

import pytest
import torch
from torch import Tensor

import kexue_kernels as kk
from kexue_kernels import vq
from kexue_kernels.vq import reference, triton_codebook_statistics, triton_ema_update
from kexue_kernels.vq.statistics import ema_step_
from tests.vq.cases import DTYPES, check_close, check_statistics, generator

ops = torch.ops.kexue_kernels


def draw(N: int, K: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = generator(N)
    return torch.randn(N, d, generator=g).to(dtype), torch.randint(-1, K, (N,), generator=g)


def shorten(monkeypatch: pytest.MonkeyPatch, chunk: int, parts: int = 2) -> None:
    """Chunks of so few rows; `parts` of them are joined at once."""
    monkeypatch.setattr(triton_codebook_statistics, "chunk_of", lambda N: chunk)
    monkeypatch.setattr(triton_codebook_statistics, "PARTS", parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 3, 300), (40, 90, 5), (45, 2, 17)], ids=str)
def test_statistics(sizes: tuple[int, int, int], dtype: torch.dtype, poisoned: None) -> None:
    x, indices = draw(*sizes, dtype)
    check_statistics(x, indices, sizes[1], "triton")


@pytest.mark.parametrize("chunk", [2, 5])
def test_runs_over_chunks(chunk: int, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes with no row, one, and so many that they begin, cover or end chunks."""
    shorten(monkeypatch, chunk)
    lengths = (3, 0, 1, 12, 4, 0, 1, 2, 7)
    indices = torch.repeat_interleave(torch.arange(-1, 8), torch.tensor(lengths))
    order = torch.randperm(len(indices), generator=generator(0))
    check_statistics(draw(len(indices), 1, 3)[0], indices[order], 8, "triton")


@pytest.mark.parametrize("first", [0, 2])
def test_one_code_owns_all_rows(
    first: int, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch, 4)
    check_statistics(draw(43, 1, 3)[0], torch.full((43,), first), 3, "triton")


def test_strides_and_narrow_indices() -> None:
    x, indices = draw(20, 4, 3)
    check_statistics(x.mT.contiguous().mT, indices.int(), 4, "triton")


def test_no_index_at_all() -> None:
    x = torch.full((3, 2), torch.nan)
    counts, sums = vq.codebook_statistics(x, torch.full((3,), -1), 2, backend="triton")
    assert counts.tolist() == [0, 0]
    assert torch.equal(sums, torch.zeros(2, 2))


def test_indices_out_of_range_are_no_rows() -> None:
    """As on a GPU, where nothing is read back to refuse them."""
    indices = torch.tensor([0, 3, -5, 2**40, -(2**40), 2**16, 0])
    counts, sums = triton_codebook_statistics.statistics(torch.ones(7, 2), indices, 3)
    assert counts.tolist() == [2, 0, 0]
    assert sums.tolist() == [[2, 2], [0, 0], [0, 0]]


def test_rows_are_added_in_their_order() -> None:
    """The same rows of a code among others in between: bitwise the same sum."""
    x, _ = draw(30, 1, 4)
    alone = triton_codebook_statistics.statistics(x, torch.zeros(30, dtype=torch.int64), 1)[1]
    mixed = torch.cat([x, torch.full_like(x, 1e6)]).view(2, 30, 4).transpose(0, 1).reshape(60, 4)
    beside = triton_codebook_statistics.statistics(mixed, torch.arange(60) % 2, 2)[1]
    assert torch.equal(alone[0], beside[0])


@pytest.mark.parametrize("K", [1, 300, 32766, 32767, 70_000])
def test_sorting(K: int) -> None:
    indices = torch.randint(-3, K + 3, (500,), generator=generator(K))
    rows = triton_codebook_statistics.sort(indices, K)
    assert rows.starts.shape == (K + 1,)
    counts = torch.bincount(indices[(indices >= 0) & (indices < K)], minlength=K)
    assert torch.equal(rows.starts.diff(), counts)
    for (i, j), (k, m) in zip(
        itertools.pairwise(rows.order.tolist()), itertools.pairwise(rows.keys.tolist()), strict=True
    ):
        assert k < m or (k == m and i < j)
        assert k == max(-1, min(K, indices[i].item()))


def test_the_rules() -> None:
    """4 channels a thread and few compilations; at most 4096 chunks, up to a million rows."""
    configure, chunk_of = triton_codebook_statistics.configure, triton_codebook_statistics.chunk_of
    assert configure(256, False) == (16, 128, 64)
    assert configure(256, True) == (8, 128, 64)
    assert configure(3, False) == (16, 16, 16)
    assert [chunk_of(N) for N in (1, 2**17, 2**17 + 1, 2**20, 2**30)] == [32, 32, 64, 256, 256]


# ---- ema_update_


def state(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = generator(1)
    codebook = torch.randn(shape, generator=g)
    size = torch.rand(shape[:-1], generator=g) + 0.1
    return [codebook.to(dtype), size, codebook * size[..., None]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99, 1.0])
def test_update(decay: float, dtype: torch.dtype) -> None:
    x, indices = draw(30, 5, 3, dtype)
    runs = []
    for backend, wide in (("reference", torch.float64), ("reference", None), ("triton", None)):
        running = [t.to(wide or t.dtype) for t in state(5, 3, dtype=dtype)]
        rows = x.to(wide or dtype)
        vq.ema_update_(*running, rows, indices, decay=decay, backend=backend)
        runs.append(running)
    for exact, own, found in zip(*runs, strict=True):
        check_close("update", found, own, exact)


@pytest.mark.parametrize("shape", [(1, 1), (4100, 2), (3, 130, 5), (2, 7, 140)], ids=str)
def test_steps_of_any_shape(shape: tuple[int, ...]) -> None:
    """Several codebooks, more codes and channels than a program has, strides."""
    g = generator(0)
    counts = torch.randint(4, shape[:-1], generator=g)
    sums = torch.randn(shape, generator=g) * counts[..., None]
    expected = state(*shape)
    reference.ema_step_(*expected, counts, sums, 0.9, 1e-5)
    strided = [torch.stack([t, t + 1], -1).mT.contiguous().mT[..., 0] for t in state(*shape)]
    for running in (state(*shape), strided):
        assert triton_ema_update.step(*running, counts, sums, 0.9, 1e-5) is running[0]
        for found, exact in zip(running, expected, strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


def test_codes_that_nothing_was_counted_for_stay() -> None:
    codebook, size, total = torch.randn(2, 3), torch.zeros(2), torch.zeros(2, 3)
    before = codebook.clone()
    empty = torch.empty(0, dtype=torch.int64)
    for eps in (1e-5, 0.0):
        vq.ema_update_(
            codebook, size, total, torch.randn(0, 3), empty, decay=0.5, eps=eps, backend="triton"
        )
        assert torch.equal(codebook, before)


def test_opcheck_of_the_step() -> None:
    args = (*state(5, 3), torch.ones(5, dtype=torch.int64), torch.ones(5, 3), 0.9, 1e-5)
    for backend in ("auto", "triton"):
        torch.library.opcheck(ops.ema_step.default, (*args, backend))


def test_autograd_sees_the_update() -> None:
    codebook = state(5, 3)[0]
    leaf = torch.randn(5, 3, requires_grad=True)
    loss = (leaf * codebook).sum()
    running = codebook, *state(5, 3)[1:]
    ema_step_(*running, torch.ones(5), torch.ones(5, 3), 0.9, 1e-5, "triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_default_backend_is_used() -> None:
    found = []
    for name in ("triton", "reference"):
        running = state(5, 3)
        with kk.use_backend(name):
            ema_step_(*running, torch.ones(5), torch.ones(5, 3), 0.9, 1e-5)
        found.append(running[0])
    torch.testing.assert_close(*found)
