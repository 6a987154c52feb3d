"""project_to_monarch: nearest, exact where it can be, by whichever method; its error and errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kexue_kernels.monarch import projection, reference
from kexue_kernels.monarch.projection import nearest_monarch, project_to_monarch
from kexue_kernels.monarch.reference import monarch_to_dense

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
CASES = [  # out, in, nblocks, rank
    (12, 20, (4, 3), 2),
    (24, 6, (2, 4), 1),
    (16, 16, 4, 3),
    (6, 60, (3, 2), 3),
    (5, 7, 1, 4),
    (8, 9, (9, 8), 1),
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def double(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def dense(w1: Tensor, w2: Tensor) -> Tensor:
    return monarch_to_dense(double(w1), double(w2))


def blocks(weight: Tensor, k: int, l: int) -> dict[tuple[int, int], Tensor]:
    """The definition: rows o with o mod l = j, columns of the input block i."""
    columns = weight.shape[1] // k
    return {
        (j, i): weight[j::l, i * columns : (i + 1) * columns] for j in range(l) for i in range(k)
    }


def tails(weight: Tensor, k: int, l: int, rank: int) -> float:
    """The relative error of the nearest Monarch: all singular values beyond each block's rank."""
    lost = [torch.linalg.svdvals(block)[rank:] for block in blocks(double(weight), k, l).values()]
    return (torch.cat(lost).square().sum().sqrt() / double(weight).norm()).item()


def with_singular_values(n: int, rows: int, columns: int, values: Tensor) -> Tensor:
    """n random matrices in float64."""
    u = torch.linalg.qr(torch.randn(n, rows, len(values), dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, columns, len(values), dtype=torch.float64)).Q
    return (u * values) @ v.mT


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_that_of_the_singular_tails(case: tuple, dtype: torch.dtype) -> None:
    out, in_, nblocks, rank = case
    k, l = (nblocks, nblocks) if isinstance(nblocks, int) else nblocks
    weight = torch.randn(out, in_, dtype=dtype)
    w1, w2, error = project_to_monarch(weight, nblocks, rank)
    assert w1.shape == (k, l * rank, in_ // k)
    assert w2.shape == (l, out // l, k * rank)
    assert w1.dtype == w2.dtype == dtype
    assert error.shape == ()
    assert error.dtype == weight.real.dtype
    tolerance = 20 * torch.finfo(dtype).eps
    measured = (double(weight) - dense(w1, w2)).norm() / double(weight).norm()
    assert error.item() == pytest.approx(measured.item(), abs=tolerance)
    assert error.item() == pytest.approx(tails(weight, k, l, rank), abs=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_references(case: tuple, dtype: torch.dtype) -> None:
    out, in_, nblocks, rank = case
    weight = torch.randn(out, in_, dtype=dtype)
    w1, w2, error = project_to_monarch(weight, nblocks, rank)
    expected1, expected2, expected = reference.project_to_monarch(weight, nblocks, rank)
    assert (w1.shape, w2.shape) == (expected1.shape, expected2.shape)
    torch.testing.assert_close(dense(w1, w2).to(dtype), dense(expected1, expected2).to(dtype))
    torch.testing.assert_close(error, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nblocks", [8, (64, 4)], ids=str)
def test_on_a_gpu(nblocks: int | tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(512, 512, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)
    *_, expected = project_to_monarch(weight, nblocks, 3)
    w1, w2, error = project_to_monarch(weight.cuda(), nblocks, 3)
    assert w1.is_cuda
    assert w2.is_cuda
    assert error.is_cuda
    measured = (double(weight) - dense(w1.cpu(), w2.cpu())).norm() / double(weight).norm()
    tolerance = 20 * torch.finfo(dtype).eps
    assert error.item() == pytest.approx(measured.item(), abs=tolerance)
    assert error.item() == pytest.approx(expected.item(), abs=tolerance)


@given(
    k=st.integers(1, 4),
    l=st.integers(1, 4),
    s=st.integers(1, 5),
    p=st.integers(1, 5),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_every_block_is_its_own_truncated_svd(
    k: int, l: int, s: int, p: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(s, p)))
    weight = torch.randn(s * l, p * k, dtype=torch.float64)
    w1, w2, _ = project_to_monarch(weight, (k, l), rank)
    made = blocks(dense(w1, w2), k, l)
    for where, block in blocks(weight, k, l).items():
        u, sigma, v = torch.linalg.svd(block, full_matrices=False)
        torch.testing.assert_close(made[where], (u[:, :rank] * sigma[:rank]) @ v[:rank])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("s", "p"), [(4, 6), (3, 24)])
def test_recovers_a_monarch(dtype: torch.dtype, s: int, p: int) -> None:
    k, l, rank = 4, 3, 2
    w1 = torch.randn(k, l * rank, p, dtype=dtype)
    w2 = torch.randn(l, s, k * rank, dtype=dtype)
    weight = dense(w1, w2).to(dtype)
    *found, error = project_to_monarch(weight, (k, l), rank)
    torch.testing.assert_close(dense(*found).to(dtype), weight)
    assert error < 10 * torch.finfo(dtype).eps


def test_no_perturbation_is_nearer() -> None:
    weight = torch.randn(12, 12, dtype=torch.float64)
    w1, w2, error = project_to_monarch(weight, (3, 4), 2)
    best = error * weight.norm()
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            near = dense(w1 + size * torch.randn_like(w1), w2 + size * torch.randn_like(w2))
            assert (weight - near).norm() >= best


def test_no_descent_from_another_start_ends_nearer() -> None:
    weight = torch.randn(8, 8, dtype=torch.float64)
    _, _, error = project_to_monarch(weight, 2, 2)
    factors = [torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    descent = torch.optim.LBFGS(factors, max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        descent.zero_grad()
        value = (weight - monarch_to_dense(*factors)).square().sum()
        value.backward()
        return value

    descent.step(loss)
    reached = loss().sqrt() / weight.norm()
    assert reached.item() == pytest.approx(error.item(), rel=1e-4)
    assert reached >= error * (1 - 1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_computed_in_single(dtype: torch.dtype) -> None:
    weight = torch.randn(12, 20).to(dtype)
    w1, w2, error = project_to_monarch(weight, (4, 3), 2)
    single1, single2, _ = project_to_monarch(weight.float(), (4, 3), 2)
    assert torch.equal(w1, single1.to(dtype))
    assert torch.equal(w2, single2.to(dtype))
    assert error.dtype == torch.float32
    measured = (double(weight) - dense(w1, w2)).norm() / double(weight).norm()
    assert error.item() == pytest.approx(measured.item(), rel=1e-5)


def test_error_of_halves_counts_the_rounding_of_the_factors() -> None:
    weight = torch.randn(8, 8).bfloat16()
    w1, w2, error = project_to_monarch(weight, 2, 4)  # full blocks: nothing else is lost
    measured = (double(weight) - dense(w1, w2)).norm() / double(weight).norm()
    assert 1e-4 < error < torch.finfo(torch.bfloat16).eps
    assert error.item() == pytest.approx(measured.item(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(6, 64, 8), (6, 8, 64), (2, 96, 48), (3, 24, 24)], ids=str)
@pytest.mark.parametrize("smallest", [1e-6, 1e-2, 1.0])
def test_gram_is_as_near_as_the_svd(
    shape: tuple[int, int, int], dtype: torch.dtype, smallest: float
) -> None:
    """Singular values down to `smallest`, which a Gram matrix in their own dtype would lose."""
    n, rows, columns = shape
    size = min(rows, columns)
    values = torch.logspace(0, math.log10(smallest), size, dtype=torch.float64)
    given = with_singular_values(n, rows, columns, values).to(dtype)
    if dtype.is_complex:
        given = given * torch.exp(1j * torch.arange(columns))
    for rank in (1, size // 2, size - 1, size):
        exact = torch.linalg.svdvals(double(given))[:, rank:].square().sum().sqrt()
        lost = {}
        for find in (projection._by_gram, projection._by_svd):
            left, right = find(given, rank)
            assert left.dtype == right.dtype == dtype
            lost[find] = (double(given) - double(left) @ double(right)).norm()
        level = torch.finfo(dtype).eps * double(given).norm()
        assert lost[projection._by_gram] <= exact + level
        assert lost[projection._by_gram] <= lost[projection._by_svd] + level


def test_gram_of_zeros_and_of_a_low_rank() -> None:
    left, right = projection._by_gram(torch.zeros(2, 9, 3), 3)
    assert (left == 0).all()
    assert (right == 0).all()
    low = torch.outer(torch.arange(9.0), torch.tensor([1.0, 2.0, 2.0]))[None]
    left, right = projection._by_gram(low, 3)
    torch.testing.assert_close(left @ right, low)


@pytest.mark.parametrize(
    ("dtype", "rows", "columns", "fast"),
    [
        (torch.float32, 64, 32, True),
        (torch.complex64, 8, 64, True),
        (torch.float32, 32, 32, False),
        (torch.float64, 64, 8, False),
        (torch.complex128, 8, 64, False),
    ],
)
def test_method_is_chosen_by_size(dtype: torch.dtype, rows: int, columns: int, fast: bool) -> None:
    assert projection._gram_is_faster(torch.empty(2, rows, columns, dtype=dtype)) is fast


@pytest.mark.parametrize(("nblocks", "rank"), [((16, 2), 4), ((4, 8), 3)])
def test_a_larger_weight(nblocks: tuple[int, int], rank: int) -> None:
    weight = torch.randn(256, 512)
    fast = projection._gram_is_faster(
        weight.view(1, 256 // nblocks[1], -1)[..., : 512 // nblocks[0]]
    )
    assert fast is True
    *_, error = project_to_monarch(weight, nblocks, rank)
    assert error.item() == pytest.approx(tails(weight, *nblocks, rank), rel=1e-6)


def test_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(12, 20)
    whole = project_to_monarch(weight, (4, 3), 2)
    monkeypatch.setattr(projection, "_CHUNK", 50)  # two blocks at once
    for part, full in zip(project_to_monarch(weight, (4, 3), 2), whole, strict=True):
        torch.testing.assert_close(part, full)


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e20, 1e38])
def test_sizes_whose_squares_no_single_holds(size: float) -> None:
    weight = torch.rand(16, 24)
    for nblocks in (2, (12, 2)):  # by SVD, by Gram
        expected = project_to_monarch(weight, nblocks, 1)
        w1, w2, error = project_to_monarch(size * weight, nblocks, 1)
        assert error.item() == pytest.approx(expected[2].item(), rel=1e-4)
        torch.testing.assert_close(dense(w1, w2) / size, dense(*expected[:2]), rtol=1e-4, atol=1e-5)


def test_zeros_have_no_error() -> None:
    w1, w2, error = project_to_monarch(torch.zeros(4, 6), 2, 2)
    assert error == 0
    assert (w1 == 0).all()
    assert (w2 == 0).all()


@pytest.mark.parametrize(
    ("out", "in_", "k", "l", "hidden"),
    [(12, 20, 4, 6, 12), (12, 20, 4, 6, 36), (12, 12, 4, 4, 12), (12, 12, 4, 4, 20)],
)
def test_uneven_ranks(out: int, in_: int, k: int, l: int, hidden: int) -> None:
    """Hidden unit m joins input block m // q and output block m mod l, and no other."""
    weight = torch.randn(out, in_, dtype=torch.float64)
    w1, w2, error = nearest_monarch(weight, k, l, hidden)
    q = hidden // k
    assert w1.shape == (k, q, in_ // k)
    assert w2.shape == (l, out // l, hidden // l)
    units = [(m % l, m // q) for m in range(hidden)]
    made = blocks(dense(w1, w2), k, l)
    ranks = {where: units.count(where) for where in made}
    assert len(set(ranks.values())) == 2
    lost = torch.zeros((), dtype=torch.float64)
    for where, block in blocks(weight, k, l).items():
        u, sigma, v = torch.linalg.svd(block, full_matrices=False)
        rank = ranks[where]
        torch.testing.assert_close(made[where], (u[:, :rank] * sigma[:rank]) @ v[:rank])
        lost += sigma[rank:].square().sum()
    assert error.item() == pytest.approx((lost.sqrt() / weight.norm()).item(), rel=1e-12)


def test_more_units_than_a_block_has_ranks() -> None:
    weight = torch.randn(4, 4)
    w1, w2, error = nearest_monarch(weight, 2, 2, 12)  # three a pair, blocks of 2 x 2
    assert w1.shape == (2, 6, 2)
    assert w2.shape == (2, 2, 6)
    torch.testing.assert_close(dense(w1, w2).float(), weight)
    assert error < 1e-6


def test_input_is_detached_and_left_alone() -> None:
    weight = torch.nn.Parameter(torch.randn(6, 8))
    before = weight.detach().clone()
    assert not any(found.requires_grad for found in project_to_monarch(weight, 2, 2))
    assert torch.equal(weight, before)


def test_any_strides() -> None:
    weight = torch.randn(20, 12).T
    for part, full in zip(
        project_to_monarch(weight, (4, 3), 2),
        project_to_monarch(weight.contiguous(), (4, 3), 2),
        strict=True,
    ):
        assert torch.equal(part, full)
        assert part.is_contiguous()


@pytest.mark.parametrize("nblocks", [4, (16, 2)], ids=["by SVD", "by Gram"])
def test_autocast_changes_nothing(nblocks: int | tuple[int, int]) -> None:
    weight = torch.randn(32, 32)
    expected = project_to_monarch(weight, nblocks, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = project_to_monarch(weight, nblocks, 2)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.float64], ids=str)
def test_on_the_meta_device(dtype: torch.dtype) -> None:
    weight = torch.ones(20, 24, dtype=dtype)
    for found, expected in zip(
        project_to_monarch(weight.to("meta"), (4, 5), 2),
        project_to_monarch(weight, (4, 5), 2),
        strict=True,
    ):
        assert found.is_meta
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


def test_complex_numbers_whose_absolute_values_no_single_holds() -> None:
    w1, w2, error = project_to_monarch(torch.full((4, 6), 3e38 - 3e38j), 2, 1)
    assert error < 1e-6
    torch.testing.assert_close(dense(w1, w2).imag / 3e38, -torch.ones(4, 6, dtype=torch.float64))


WEIGHT = torch.zeros(6, 8)


@pytest.mark.parametrize(
    ("weight", "nblocks", "rank", "error", "words"),
    [
        ([[1.0]], 1, 1, TypeError, ["weight", "torch.Tensor", "list"]),
        (WEIGHT.long(), 2, 1, ValueError, ["weight", "float32", "int64"]),
        (torch.zeros(6), 2, 1, ValueError, ["weight", "[out, in]", "[6]"]),
        (WEIGHT / 0, 2, 1, ValueError, ["weight", "finite", "NaN"]),
        (WEIGHT, 4, 1, ValueError, ["nblocks", "l to divide out = 6", "4"]),
        (WEIGHT, (3, 2), 1, ValueError, ["nblocks", "k to divide in = 8", "3"]),
        (WEIGHT, 0, 1, ValueError, ["nblocks", "at least 1", "0"]),
        (WEIGHT, (2, -2), 1, ValueError, ["nblocks", "at least 1", "-2"]),
        (WEIGHT, 2.0, 1, TypeError, ["nblocks", "int", "float"]),
        (WEIGHT, True, 1, TypeError, ["nblocks", "int", "bool"]),
        (WEIGHT, (2, 2, 2), 1, ValueError, ["nblocks", "pair", "(2, 2, 2)"]),
        (WEIGHT, 2, 0, ValueError, ["rank", "at least 1", "0"]),
        (WEIGHT, 2, 4, ValueError, ["rank", "at most 3", "3 x 4", "4"]),
        (WEIGHT, 2, 1.0, TypeError, ["rank", "int", "float"]),
        (torch.zeros(0, 8), 2, 1, ValueError, ["rank", "at most 0", "0 x 4"]),
    ],
)
def test_bad_input(
    weight: object, nblocks: object, rank: object, error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        project_to_monarch(weight, nblocks, rank)  # type: ignore[arg-type]
    for word in words:
        assert word in str(caught.value)
