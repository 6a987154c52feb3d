"""The gate before the clock: is what a contestant computes right?

Its largest error against double precision, in the output and in every gradient, may be at most
twice that of plain PyTorch in the case's dtype, plus some roundings of the largest value: four in
the case's dtype, and as many in float32, where sums are kept, as the root of their terms.

The latter is for sums in another order. A sum of m products of both signs, kept in float32 one
after the other, is off by some sqrt(m) roundings of its own size (Higham and Mary, "Sharper
probabilistic backward error analysis for basic linear algebra kernels with random data", 2020);
taken pairwise by much less, and PyTorch itself does either: `sum` the one, `bmm` the other.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from kexue_kernels.benchmarks.case import Bound, Case, Direction, Inputs, differentiable

ROUNDINGS = 4
SUM_ROUNDING = torch.finfo(torch.float32).eps / 2  # what one takes off at most


class Expected(NamedTuple):
    value: Tensor  # in double precision
    limit: float  # the largest error allowed


def expect(case: Case, inputs: Inputs, grad: Tensor) -> dict[str, Expected]:
    """The right results, and how far from them a contestant may be."""
    direction: Direction = "forward" if case.direction == "forward" else "forward+backward"
    doubled = {name: double(x) if differentiable(x) else x for name, x in inputs.items()}
    truth = Bound(case.reference, direction, doubled, double(grad)).results()
    plain = Bound(case.reference, direction, inputs, grad).results()
    expected = {}
    for name, value in truth.items():
        own = plain[name]
        limit = 2 * largest_error(own, value) + _rounding(own, value, case.shape.values())
        if not math.isfinite(limit):
            raise ValueError(f"the reference's {name} is not finite: nothing to judge by")
        expected[name] = Expected(value, limit)
    return expected


def judge(
    found: dict[str, Tensor], expected: dict[str, Expected]
) -> tuple[dict[str, dict[str, float | None]], str]:
    """Each result's error and limit, and what is wrong (empty if nothing is)."""
    errors: dict[str, dict[str, float | None]] = {}
    wrong = []
    for name, (value, limit) in expected.items():
        error = largest_error(found[name], value)
        errors[name] = {"error": error if math.isfinite(error) else None, "limit": limit}
        if not error <= limit:
            wrong.append(f"error {error:.2e} in the {name}, allowed {limit:.2e}")
    return errors, "; ".join(wrong)


def largest_error(x: Tensor, truth: Tensor) -> float:
    """NaN and infinity count as infinite."""
    if x.shape != truth.shape:
        return math.inf
    distance = (x.to(truth.dtype) - truth).abs()
    return (
        distance.nan_to_num(nan=math.inf, posinf=math.inf).max().item() if distance.numel() else 0.0
    )


def double(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def _rounding(x: Tensor, truth: Tensor, sizes: Iterable[int]) -> float:
    """`sizes` are those of the case: what of their product is not in the result is summed over."""
    if not truth.numel():
        return 0.0
    terms = math.prod(sizes) / truth.numel()
    roundings = ROUNDINGS * torch.finfo(x.dtype).eps + math.sqrt(terms) * SUM_ROUNDING
    return roundings * truth.abs().max().item()
