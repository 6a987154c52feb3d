"""The nearest code in double precision, and the vq family's gate: how many rows are not right.

Of ours, but for the "fast" search, no row may be wrong. Peers that search in float32 or less are
timed with the share of rows that they get wrong.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

import kexue_kernels as kk
from kexue_kernels.benchmarks.case import Bound, Case, Contestant, Inputs
from kexue_kernels.benchmarks.check import double
from kexue_kernels.benchmarks.results import ROWS

ELEMENTS = 2**24  # of a product of rows and codes
NEAR = 1e-9  # scores as close as this, beside their size, are told apart by the definition
ROUNDINGS = 4


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """int64 [N] for x [N, d] and codebook [K, d]: products in double precision, and the
    reference, which subtracts, for rows whose two nearest codes those leave open."""
    codes = codebook.double()
    half = codes.square().sum(1) / 2
    parts, unsure = [], []
    for rows in x.split(max(1, ELEMENTS // codes.shape[0])):
        wide = rows.double()
        scores = torch.addmm(half, wide, codes.mT, alpha=-1)
        least, at = scores.topk(min(2, codes.shape[0]), largest=False)
        size = wide.square().sum(1) + half.max()
        parts.append(at[:, 0])
        unsure.append(~(least[:, -1] - least[:, 0] > NEAR * size))
    found, open_ = torch.cat(parts), torch.cat(unsure).nonzero()[:, 0]
    if open_.numel() and codes.shape[0] > 1:
        found[open_] = kk.reference.nearest_codebook(x[open_], codebook)
    return found


def reference() -> Contestant:
    return Contestant("double precision", lambda: nearest)


class Expected(NamedTuple):
    value: Tensor
    limit: float  # of an element's error


class Gate:
    """Which rows of the output differ: indices at all, others beyond `limit`.

    That is twice the largest error of plain PyTorch in the case's dtype, plus four roundings of
    the largest value.
    """

    def expect(self, case: Case, inputs: Inputs, grad: Tensor) -> Expected:
        plain = Bound(case.reference, "forward", inputs, grad).results()["output"]
        if not plain.is_floating_point():
            return Expected(plain, 0.0)
        doubled = {name: double(x) for name, x in inputs.items()}
        truth = Bound(case.reference, "forward", doubled, double(grad)).results()["output"]
        error, largest = (plain - truth).abs().max().item(), truth.abs().max().item()
        limit = 2 * error + ROUNDINGS * torch.finfo(plain.dtype).eps * largest
        if not math.isfinite(limit):
            raise ValueError("the reference's output is not finite: nothing to judge by")
        return Expected(truth, limit)

    def judge(
        self, found: dict[str, Tensor], expected: Expected
    ) -> tuple[dict[str, dict[str, float | None]], str]:
        value, limit = expected
        output = found["output"]
        if output.shape != value.shape:
            shape = f"shape {list(output.shape)}, expected {list(value.shape)}"
            return {ROWS: {"error": 1.0, "limit": 0.0}}, shape
        right = output == value if limit == 0 else (output - value).abs() <= limit
        wrong = ~right.reshape(value.shape[0], -1).all(1)
        share = wrong.double().mean().item() if wrong.numel() else 0.0
        said = f"{int(wrong.sum())} of {wrong.numel()} rows are wrong" if share else ""
        return {ROWS: {"error": share, "limit": 0.0}}, said
