"""A linear layer whose weight is a Monarch matrix."""

import math
from typing import Self

import torch
from torch import Tensor, nn

from kexue_kernels import checks
from kexue_kernels.monarch import monarch_matmul, monarch_to_dense
from kexue_kernels.monarch.arguments import check_rank
from kexue_kernels.monarch.projection import checked_nblocks, nearest_monarch
from kexue_kernels.nn import arguments

__all__ = ["MonarchLinear"]


class MonarchLinear(nn.Module):
    """y = x W^T + b with W a Monarch matrix: two block-diagonal factors, a permutation between.

    Args:
        in_features, out_features: sizes of the last axis of input and output.
        bias: learn an offset.
        nblocks: blocks (k, l) of the two factors, or an int for both; k divides in_features, l
            divides out_features.
        rank: of the blocks that W falls into (one for each pair of k and l), from 1 to
            min(in_features / k, out_features / l). None: a hidden width of min(in_features,
            out_features), rounded up to a multiple of k and l.
        device, dtype: of the parameters; a floating dtype, real or complex.

    Parameters, w1 and w2 as `kexue_kernels.monarch_matmul` takes them:
        w1: [k, hidden / k, in_features / k].
        w2: [l, out_features / l, hidden / l]; hidden is k l rank where a rank is given.
        bias: [out_features].
    They start uniform, with variances for which W's entries have the variance of those of a
    `torch.nn.Linear`; the bias starts as there.

    Source: Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate
    Training" (2022), section 3; the hidden width is that of the authors' MonarchLinear.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        nblocks: int | tuple[int, int] = 4,
        rank: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        arguments.size("in_features", in_features)
        arguments.size("out_features", out_features)
        checks.boolean("bias", bias)
        _check_dtype(dtype)
        self.in_features, self.out_features = in_features, out_features
        self.nblocks = k, l = checked_nblocks(nblocks, in_features, out_features)
        self.rank = rank
        hidden = hidden_features(in_features, out_features, self.nblocks, rank)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.w1 = parameter(k, hidden // k, in_features // k)
        self.w2 = parameter(l, out_features // l, hidden // l)
        self.register_parameter("bias", parameter(out_features) if bias else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw them anew.

        An output is a sum of r products with w2 of sums of p products with w1: p r v1 v2 is its
        variance for inputs of variance 1. A `torch.nn.Linear` has 1/3; either factor makes up
        for its own sum and for half of that.
        """
        for factor in (self.w1, self.w2):
            _uniform_(factor, variance=1 / (math.sqrt(3) * factor.shape[2]))
        if self.bias is not None:
            _uniform_(self.bias, variance=1 / (3 * self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """[..., out_features] of x [..., in_features], in the parameters' dtype."""
        return monarch_matmul(x, self.w1, self.w2, self.bias)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        nblocks: int | tuple[int, int] = 4,
        rank: int | None = None,
    ) -> Self:
        """The Monarch layer nearest to `linear`: its weight projected, its bias copied.

        Its dtype, device and mode are `linear`'s; `nblocks` and `rank` are the constructor's.

        Raises:
            TypeError: not a torch.nn.Linear.
            ValueError: nblocks or rank that doesn't fit it, or a weight that is not finite.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected a torch.nn.Linear, got {type(linear).__name__}")
        weight, bias = linear.weight, linear.bias
        made = cls(
            linear.in_features,
            linear.out_features,
            bias is not None,
            nblocks=nblocks,
            rank=rank,
            device="meta",  # where drawing numbers costs nothing
            dtype=weight.dtype,
        ).to_empty(device=weight.device)
        hidden = made.w1.shape[0] * made.w1.shape[1]
        with torch.no_grad():
            w1, w2, _ = nearest_monarch(weight, *made.nblocks, hidden)
            made.w1.copy_(w1)
            made.w2.copy_(w2)
            if made.bias is not None:
                made.bias.copy_(bias)
        return made.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The dense layer that computes the same."""
        sizes = self.in_features, self.out_features, self.bias is not None
        linear = nn.Linear(*sizes, device="meta", dtype=self.w1.dtype)
        linear = linear.to_empty(device=self.w1.device)
        with torch.no_grad():
            linear.weight.copy_(monarch_to_dense(self.w1, self.w2))
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """The sizes, blocks and rank."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, nblocks={self.nblocks}, rank={self.rank}"
        )


def hidden_features(
    in_features: int, out_features: int, nblocks: tuple[int, int], rank: int | None
) -> int:
    """What lies between the factors, a multiple of both numbers of blocks."""
    k, l = nblocks
    if rank is not None:
        check_rank(rank, out_features // l, in_features // k)
        return k * l * rank
    step = math.lcm(k, l)
    return -(-min(in_features, out_features) // step) * step


def _uniform_(x: Tensor, variance: float) -> None:
    if x.is_complex():
        x, variance = torch.view_as_real(x), variance / 2
    bound = math.sqrt(3 * variance)
    x.uniform_(-bound, bound)


def _check_dtype(dtype: object) -> None:
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {type(dtype).__name__}")
    if dtype is not None and dtype not in checks.FLOATING:
        raise ValueError(f"dtype: expected a floating dtype, real or complex, got {dtype}")
