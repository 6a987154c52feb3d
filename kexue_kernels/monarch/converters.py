"""Factors from other conventions to ours, and back: fly's einsum forms, block tensor-train."""

import torch
from torch import Tensor

from kexue_kernels import checks, options

__all__ = [
    "from_block_tensor_train",
    "from_einsum",
    "from_einsum_rank",
    "to_block_tensor_train",
    "to_einsum",
]


def from_einsum_rank(w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """From fly's `blockdiag_butterfly_multiply_einsum_rank`: the same numbers in the same places.

    w1 [k, rank * l, p], its rows over (rank, l), and w2 [l, s, k * rank], its columns over
    (k, rank), the last of each fastest: `monarch_matmul`'s layout wherever l divides q. So are
    `blkdiag1` and `blkdiag2` of fly's MonarchLinear. Checks the shapes, returns both.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: shapes that don't fit each other.
    """
    _rank(w1, w2)
    return w1, w2


def from_einsum(w1: Tensor, w2: Tensor, b2: int = 1) -> tuple[Tensor, Tensor]:
    """From fly's `blockdiag_butterfly_multiply_einsum`.

    Args:
        w1: [k, l * rank, p], rows over (l, rank), rank fastest (their b1).
        w2: [l, s * b2, k * rank], columns over (k, rank), rank fastest.
        b2: how many neighbouring outputs a block of theirs makes: their output is over
            (s, l, b2), b2 fastest.

    Returns:
        w1 [k, rank * l * b2, p] and w2 [l * b2, s, k * rank] of the same matrix. With b2 above 1
        the hidden width grows b2 times: outputs that shared a hidden unit are in blocks of their
        own here.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: shapes that don't fit each other, or b2.
    """
    rank = _rank(w1, w2)
    options.integer("b2", b2)
    k, _, p = w1.shape
    l, rows, r = w2.shape
    if rows % b2:
        raise ValueError(f"b2: expected a divisor of w2's {rows} rows, got {b2}")
    units = w1.view(k, l, rank, p).transpose(1, 2)[:, :, :, None]  # k a l 1 p
    first = units.expand(k, rank, l, b2, p).reshape(k, rank * l * b2, p)
    second = w2.view(l, rows // b2, b2, r).transpose(1, 2).reshape(l * b2, rows // b2, r)
    return first, second


def to_einsum(w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """To fly's `blockdiag_butterfly_multiply_einsum` with b2 = 1: `from_einsum` undone.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: shapes that don't fit each other, or an l that doesn't divide q.
    """
    rank = _rank(w1, w2)
    k, q, p = w1.shape
    l = w2.shape[0]
    return w1.view(k, rank, l, p).transpose(1, 2).reshape(k, q, p), w2


def from_block_tensor_train(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From a block tensor-train of two cores: (w1, w2, permutation).

    Their y = x A over (l, s), s fastest, is `monarch_matmul(x, w1, w2)[..., permutation]`; ours
    has l fastest, and no Monarch of this size can swap the two. Weights that read y, or a
    normalisation's, can be permuted once instead.

    Args:
        first: [k, p, l * rank], columns over (l, rank), rank fastest; applied to x over (k, p).
        second: [l, k * rank, s], rows over (k, rank), rank fastest.

    Returns:
        w1 [k, rank * l, p], w2 [l, s, k * rank] and permutation int64 [l * s].

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: shapes that don't fit each other.

    Source: the layout of the code of Qiu et al., "Compute Better Spent: Replacing Dense Layers
    with Structured Matrices" (2024).
    """
    checks.tensor("first", first)
    checks.ndim("first", first, 3, "[k, p, l * rank]")
    checks.tensor("second", second)
    checks.ndim("second", second, 3, "[l, k * rank, s]")
    rank = _rank(first.mT, second.mT, names=("first", "second"))
    k, p, q = first.shape
    l, _, s = second.shape
    w1 = first.reshape(k, p, l, rank).permute(0, 3, 2, 1).reshape(k, q, p)
    permutation = torch.arange(s * l, device=first.device).view(s, l).T.reshape(s * l)
    return w1, second.mT.contiguous(), permutation


def to_block_tensor_train(w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """(first, second) as `from_block_tensor_train` takes them, which gives back w1 and w2.

    Their output is ours with l and s swapped: y.unflatten(-1, (s, l)).mT, flattened.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: shapes that don't fit each other, or an l that doesn't divide q.
    """
    rank = _rank(w1, w2)
    k, q, p = w1.shape
    l = w2.shape[0]
    first = w1.reshape(k, rank, l, p).permute(0, 3, 2, 1).reshape(k, p, q)
    return first, w2.mT.contiguous()


def _rank(w1: object, w2: object, names: tuple[str, str] = ("w1", "w2")) -> int:
    """q / l, after checking that hidden units can be counted over (k, l, rank)."""
    for name, value in zip(names, (w1, w2), strict=True):
        checks.tensor(name, value)
        assert isinstance(value, Tensor)
        checks.ndim(name, value, 3, "[blocks, out, in]")
    assert isinstance(w1, Tensor)
    assert isinstance(w2, Tensor)
    checks.dtype(names[0], w1, checks.FLOATING)
    checks.dtype(names[1], w2, (w1.dtype,))
    checks.device(names[1], w2, w1.device, names[0])
    k, q, _ = w1.shape
    l, _, r = w2.shape
    if l == 0 or q % l or r * l != k * q:
        raise ValueError(
            f"{names[0]} and {names[1]}: expected {l} * rank hidden units in each of the {k} "
            f"blocks of the first and {k} * rank in each of the {l} of the second, "
            f"got {q} and {r}"
        )
    return q // l
