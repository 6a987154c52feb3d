"""Other conventions' factors: the dense matrix of each, by its own definition, is ours."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kexue_kernels.monarch import converters
from kexue_kernels.monarch.reference import monarch_to_dense

SIZES = [(2, 3, 4, 5, 2), (3, 2, 4, 1, 1), (4, 4, 2, 3, 3), (1, 2, 1, 2, 1)]  # k, l, s, p, rank


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def factors(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_einsum_rank(size: tuple[int, ...]) -> None:
    k, l, s, p, rank = size
    w1, w2 = factors((k, rank * l, p), (l, s, k * rank))
    split1, split2 = w1.view(k, rank, l, p), w2.view(l, s, k, rank)
    expected = torch.einsum("kalp,lska->slkp", split1, split2).reshape(s * l, k * p)
    torch.testing.assert_close(monarch_to_dense(*converters.from_einsum_rank(w1, w2)), expected)


@pytest.mark.parametrize("b2", [1, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_einsum(size: tuple[int, ...], b2: int) -> None:
    k, l, s, p, rank = size
    w1, w2 = factors((k, l * rank, p), (l, s * b2, k * rank))
    split1, split2 = w1.view(k, l, rank, p), w2.view(l, s, b2, k, rank)
    expected = torch.einsum("klap,lsbka->slbkp", split1, split2).reshape(s * l * b2, k * p)
    found = converters.from_einsum(w1, w2, b2)
    assert found[0].shape == (k, rank * l * b2, p)
    assert found[1].shape == (l * b2, s, k * rank)
    torch.testing.assert_close(monarch_to_dense(*found), expected)
    if b2 == 1:
        for back, given in zip(converters.to_einsum(*found), (w1, w2), strict=True):
            assert torch.equal(back, given)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_block_tensor_train(size: tuple[int, ...]) -> None:
    k, l, s, p, rank = size
    first, second = factors((k, p, l * rank), (l, k * rank, s))
    split1, split2 = first.view(k, p, l, rank), second.view(l, k, rank, s)
    expected = torch.einsum("kpla,lkas->lskp", split1, split2).reshape(l * s, k * p)
    w1, w2, permutation = converters.from_block_tensor_train(first, second)
    assert w1.shape == (k, rank * l, p)
    assert w2.shape == (l, s, k * rank)
    torch.testing.assert_close(monarch_to_dense(w1, w2)[permutation], expected)
    for back, given in zip(converters.to_block_tensor_train(w1, w2), (first, second), strict=True):
        assert torch.equal(back, given)


def test_block_tensor_train_as_two_batched_products() -> None:
    """The published code's steps, bmm by bmm."""
    k, l, s, p, rank, batch = 3, 4, 2, 5, 2, 6
    first, second = factors((k, p, l * rank), (l, k * rank, s))
    x = torch.randn(batch, k * p, dtype=torch.float64)
    inner = torch.bmm(x.view(batch, k, p).transpose(0, 1), first)  # [k, batch, l * rank]
    inner = inner.view(k, batch, l, rank).permute(2, 1, 0, 3).reshape(l, batch, k * rank)
    y = torch.bmm(inner, second).transpose(0, 1).reshape(batch, l * s)
    w1, w2, permutation = converters.from_block_tensor_train(first, second)
    torch.testing.assert_close((x @ monarch_to_dense(w1, w2).T)[:, permutation], y)


def test_other_strides() -> None:
    w1, w2 = factors((2, 6, 5), (3, 4, 4))
    strided = w1.transpose(0, 2).contiguous().transpose(0, 2)
    for convert in (converters.from_einsum, converters.to_einsum, converters.to_block_tensor_train):
        for a, b in zip(convert(strided, w2), convert(w1, w2), strict=True):
            assert torch.equal(a, b)


W1, W2 = torch.zeros(2, 6, 5), torch.zeros(3, 4, 4)


@pytest.mark.parametrize(
    "convert",
    [
        converters.from_einsum_rank,
        converters.from_einsum,
        converters.to_einsum,
        converters.to_block_tensor_train,
        lambda w1, w2: converters.from_block_tensor_train(w1.mT, w2.mT),
    ],
)
@pytest.mark.parametrize(
    ("w1", "w2", "words"),
    [
        (W1, W2[..., :3], ["3 * rank hidden units", "got 6 and 3"]),
        (W1[:, :4], W2, ["3 * rank hidden units", "got 4 and 4"]),
        (W1, W2[:0], ["0 * rank hidden units"]),
        (W1[0], W2, ["expected shape", "[6, 5]"]),
        (W1, W2.double(), ["expected dtype float32", "float64"]),
    ],
)
def test_factors_that_dont_fit(
    convert: Callable[[Tensor, Tensor], object], w1: Tensor, w2: Tensor, words: list[str]
) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        convert(w1, w2)
    if w1.ndim == 3:
        for word in words:
            assert word in str(caught.value)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: converters.from_einsum(W1.long(), W2), ValueError, ["w1", "float32", "int64"]),
        (lambda: converters.from_einsum(W1, W2, 3), ValueError, ["b2", "w2's 4 rows", "3"]),
        (lambda: converters.from_einsum(W1, W2, 0), ValueError, ["b2", "at least 1", "0"]),
        (lambda: converters.from_einsum(W1, W2, 2.0), TypeError, ["b2", "int", "float"]),
        (lambda: converters.from_einsum_rank(W1, None), TypeError, ["w2", "NoneType"]),
        (lambda: converters.from_block_tensor_train(1, W2), TypeError, ["first", "int"]),
    ],
)
def test_bad_input(call: Callable[[], object], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
