"""fsq: both published bounds, values and indices written out, gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kexue_kernels import vq

LEVELS = [(8, 5, 5, 5), (3,), (2, 2), (7, 4, 2), (16, 9)]


def by_hand(x: list[float], levels: tuple[int, ...], symmetric: bool) -> tuple[list[float], int]:
    """One row, number by number."""
    values, index, basis = [], 0, 1
    for z, L in zip(x, levels, strict=True):
        if symmetric:
            place = math.floor((L - 1) * (math.tanh(z) + 1) / 2 + 0.5)
            values.append(2 * place / (L - 1) - 1)
        else:
            h, o = (L - 1) * 1.001 / 2, 0.5 if L % 2 == 0 else 0.0
            n = round(math.tanh(z + math.atanh(o / h)) * h - o)
            values.append(n / (L // 2))
            place = n + L // 2
        index, basis = index + place * basis, basis * L
    return values, index


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_written_out(levels: tuple[int, ...], symmetric: bool) -> None:
    x = 3 * torch.randn(200, len(levels), dtype=torch.float64)
    quantized, indices = vq.fsq(x, levels, preserve_symmetry=symmetric)
    expected = [by_hand(row, levels, symmetric) for row in x.tolist()]
    torch.testing.assert_close(quantized, torch.tensor([v for v, _ in expected]).double())
    assert indices.tolist() == [i for _, i in expected]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_every_index_is_reached_and_no_other(levels: tuple[int, ...], symmetric: bool) -> None:
    steps = torch.linspace(-4, 4, 400)
    for channel, L in enumerate(levels):
        x = torch.zeros(400, len(levels))
        x[:, channel] = steps
        quantized, indices = vq.fsq(x, levels, preserve_symmetry=symmetric)
        digit = indices // math.prod(levels[:channel]) % L
        assert digit.unique().tolist() == list(range(L))
        assert (digit.diff() >= 0).all()
        assert quantized.abs().max() <= 1
        if symmetric:
            assert quantized[:, channel].unique().tolist() == pytest.approx(
                torch.linspace(-1, 1, L).tolist(), abs=1e-6
            )


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradient_is_that_of_the_bound(symmetric: bool) -> None:
    levels = (8, 5, 2)
    x = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    g = torch.randn(20, 3, dtype=torch.float64)
    (found,) = torch.autograd.grad(vq.fsq(x, levels, preserve_symmetry=symmetric)[0], x, g)
    L = torch.tensor(levels, dtype=torch.float64)
    if symmetric:
        slope = 1 - x.tanh() ** 2
    else:
        h, o = (L - 1) * 1.001 / 2, torch.where(L % 2 == 0, 0.5, 0.0).double()
        slope = (1 - torch.tanh(x + torch.atanh(o / h)) ** 2) * h / (L // 2)
    torch.testing.assert_close(found, g * slope)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_and_shapes(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 4).to(dtype)
    quantized, indices = vq.fsq(x, [8, 5, 5, 5])
    assert (quantized.dtype, quantized.shape) == (dtype, x.shape)
    assert (indices.dtype, indices.shape) == (torch.int64, (2, 3))
    assert torch.equal(indices, vq.fsq(x.float(), (8, 5, 5, 5))[1])
    assert vq.fsq(torch.randn(0, 2).to(dtype), (3, 3))[1].shape == (0,)
    assert vq.fsq(torch.randn(2).to(dtype), (3, 3))[1].shape == ()


@pytest.mark.parametrize("symmetric", [False, True])
def test_nan_and_infinity(symmetric: bool) -> None:
    x = torch.tensor([[0.0, torch.nan], [torch.inf, -torch.inf], [0.0, 0.0]])
    quantized, indices = vq.fsq(x, (5, 5), preserve_symmetry=symmetric)
    assert quantized[0, 1].isnan()
    assert quantized[1].tolist() == [1, -1]
    assert indices.tolist() == [-1, 4, 12]


def test_many_levels_need_int64() -> None:
    levels = (1001,) * 6
    quantized, indices = vq.fsq(torch.full((1, 6), 100.0), levels)
    assert indices.item() == 1001**6 - 1
    assert torch.equal(quantized, torch.ones(1, 6))


def test_compiles_whole() -> None:
    def call(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return vq.fsq(x, (8, 5, 5))

    x = torch.randn(7, 3)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    leaf = x.clone().requires_grad_()
    for found, expected in zip(compiled(x), call(x), strict=True):
        assert torch.equal(found, expected)
    (grad,) = torch.autograd.grad(compiled(leaf)[0].sum(), leaf)
    (expected,) = torch.autograd.grad(call(leaf)[0].sum(), leaf)
    torch.testing.assert_close(grad, expected)


@settings(max_examples=30, deadline=None)
@given(
    levels=st.lists(st.integers(2, 12), min_size=1, max_size=5),
    symmetric=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_index_says_the_quantized_value(levels, symmetric, seed) -> None:
    g = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(50, len(levels), generator=g)
    quantized, indices = vq.fsq(x, levels, preserve_symmetry=symmetric)
    for channel, L in enumerate(levels):
        digit = indices // math.prod(levels[:channel]) % L
        value = 2 * digit / (L - 1) - 1 if symmetric else (digit - L // 2) / (L // 2)
        torch.testing.assert_close(quantized[:, channel], value.float())


BAD = [
    ((None, [3]), TypeError, "x: expected a torch.Tensor, got NoneType"),
    ((torch.zeros(2, 1).long(), [3]), ValueError, "x: expected dtype float32 .* got int64"),
    ((torch.zeros(2, 3), [3, 3]), ValueError, r"x: .* n = 2 levels, got \[2, 3\]"),
    ((torch.zeros(()), [3]), ValueError, r"x: .* got \[\]"),
    ((torch.zeros(2, 1), 3), TypeError, "levels: expected a sequence of ints, got int"),
    ((torch.zeros(2, 1), "3"), TypeError, "levels: expected a sequence of ints, got str"),
    ((torch.zeros(2, 0), []), ValueError, "levels: expected at least one"),
    ((torch.zeros(2, 2), [3, 1]), ValueError, r"levels\[1\]: expected at least 2, got 1"),
    ((torch.zeros(2, 1), [3.0]), TypeError, r"levels\[0\]: expected an int, got float"),
    ((torch.zeros(2, 1), [True]), TypeError, r"levels\[0\]: expected an int, got bool"),
    ((torch.zeros(2, 7), [1024] * 7), ValueError, r"levels: expected a product below 2\^63"),
]


@pytest.mark.parametrize(("args", "error", "words"), BAD, ids=lambda v: str(v)[:40])
def test_bad_input(args, error, words) -> None:
    with pytest.raises(error, match=words):
        vq.fsq(*args)


def test_bad_option() -> None:
    with pytest.raises(TypeError, match="preserve_symmetry: expected a bool, got int"):
        vq.fsq(torch.zeros(2, 1), [3], preserve_symmetry=1)  # type: ignore[arg-type]
