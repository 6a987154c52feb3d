"""nearest_codebook in PyTorch by blocks of rows and codes: where no compiled kernel serves.

The score of code k is S_k = |c_k|^2 / 2 - x.c_k (for "dot" and "cosine" without the first
term), after taking the codes' mean from the codes, for "l2" from the rows too. A product in
float64 gives a lower bound L_k of it, an upper one is U_k = L_k + 2 E_k. A row whose smallest L
belongs to code b is certified where U_b is below every other L. The rest are compared again by
the definition, among the codes whose L does not exceed U_b. The README proves the bound.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_CODES = 4096  # or rows, of which there is a copy in float64 at once
_ELEMENTS = 1 << 20  # of such a copy, and of a product
_PAIRS = 1 << 12  # compared at once by the definition
_EPS = 2.0**-52  # twice the largest relative error of an operation


def search(x: Tensor, codebook: Tensor, metric: str, precision: str) -> Tensor:
    indices = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        for rows, codes, found in zip(x, codebook, indices, strict=True):
            _search(rows, _Codes(codes, metric), precision == "exact", found)
    return indices


def _search(x: Tensor, codes: "_Codes", exact: bool, found: Tensor) -> None:
    """Fill `found` [N] for x [N, d]."""
    dtype = torch.float64 if exact else torch.float32
    best = Best(
        torch.full(found.shape, torch.inf, dtype=dtype, device=x.device),
        torch.full(found.shape, torch.inf, dtype=dtype, device=x.device),
        found.fill_(-1),
    )
    for block in codes.blocks(dtype):
        parts = (tensor.split(codes.rows_beside(block)) for tensor in (x, *best))
        for rows, *part in zip(*parts, strict=True):
            _two_best(block, codes.rows(rows, dtype), Best(*part))
    finite = _finite(x)
    if exact:
        upper = best.first + 2 * codes.error(best.code, x)
        open_ = ((found >= 0) & ~(upper < best.second) & finite).nonzero()[:, 0]
        if open_.numel():
            found[open_] = _compare(x, codes, open_, upper)
    found.masked_fill_(~finite, -1)


class Best(NamedTuple):
    """Of each row: the lowest bound, the next, and whose the lowest is."""

    first: Tensor
    second: Tensor
    code: Tensor


class Block(NamedTuple):
    """Finite codes of the codebook: L_k = offset_k - x.matrix_k, x having a last column of |x|."""

    ids: Tensor
    matrix: Tensor  # [codes, d + 1]
    offset: Tensor


class _Codes:
    """A codebook [K, d] as the bounds need it, in blocks."""

    def __init__(self, codes: Tensor, metric: str) -> None:
        self.codes, self.metric = codes, metric
        self.tolerance = 2 * (codes.shape[1] + 16) * _EPS
        self.per_block = max(1, min(_CODES, _ELEMENTS // codes.shape[1]))
        total, count = codes.new_zeros(codes.shape[1], dtype=torch.float64), 0
        for ids, values in self._finite():
            total += values.sum(0)
            count += ids.shape[0]
        self.mean = total / max(count, 1)

    def blocks(self, dtype: torch.dtype) -> Iterator[Block]:
        for ids, values in self._finite():
            centred, norms, offset = self._centred(values)
            matrix = torch.cat([centred, self.tolerance * norms[:, None]], dim=1)
            offset = offset * (1 - self.tolerance)
            yield Block(ids, matrix.to(dtype), offset.to(dtype))

    def rows_beside(self, block: Block) -> int:
        """How many rows to multiply with a block at once."""
        return max(1, min(self.per_block, _ELEMENTS // block.ids.shape[0]))

    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x [N, d] with a last column of |x|, centred as the codes are."""
        x = self._row(x)
        return torch.cat([x, _norm(x)], dim=1).to(dtype)

    def error(self, index: Tensor, x: Tensor) -> Tensor:
        """E of row n and code index[n]: float64 [N]. What all codes of a row share is added."""
        errors = torch.zeros(index.shape, dtype=torch.float64, device=x.device)
        parts = (tensor.split(self.per_block) for tensor in (x, index, errors))
        for rows, at, out in zip(*parts, strict=True):
            values = self.values(self.codes[at.clamp(min=0)])
            _, norms, offset = self._centred(values)
            x_norms = _norm(self._row(rows))[:, 0]
            shared = x_norms.square() / 2 if self.metric == "l2" else x_norms * self.mean.norm()
            out.copy_(self.tolerance * (x_norms * norms + offset + shared))
        return errors

    def values(self, codes: Tensor) -> Tensor:
        """The codes in float64, for "cosine" divided by their norms."""
        codes = codes.double()
        if self.metric != "cosine":
            return codes
        norms = _norm(codes)
        return torch.where(norms > 0, codes / norms, 0.0)

    def _row(self, x: Tensor) -> Tensor:
        return x.double() - self.mean if self.metric == "l2" else x.double()

    def _centred(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Centred codes, their norms, and |c|^2 / 2 where it counts."""
        centred = values - self.mean
        norms = _norm(centred)[:, 0]
        half = norms.square() / 2
        return centred, norms, half if self.metric == "l2" else torch.zeros_like(half)

    def _finite(self) -> Iterator[tuple[Tensor, Tensor]]:
        start = 0
        for block in self.codes.split(self.per_block):
            ids = _finite(block).nonzero()[:, 0]
            if ids.numel():
                yield ids + start, self.values(block[ids])
            start += block.shape[0]


def _two_best(block: Block, x: Tensor, best: Best) -> None:
    """Take a block's codes into account for rows x [N, d + 1]."""
    lower = torch.addmm(block.offset, x, block.matrix.mT, alpha=-1)
    lowest, at = lower.topk(min(2, lower.shape[1]), largest=False)
    first = lowest[:, 0]
    better = (first < best.first) | (best.code < 0)  # the latter where float32 overflows
    loser = torch.maximum(best.first, first)
    if lower.shape[1] > 1:
        loser = torch.minimum(loser, lowest[:, 1])
    torch.minimum(best.second, loser, out=best.second)
    torch.minimum(best.first, first, out=best.first)
    best.code.copy_(torch.where(better, block.ids[at[:, 0]], best.code))


def _compare(x: Tensor, codes: _Codes, rows: Tensor, upper: Tensor) -> Tensor:
    """By the definition, the nearest of the codes whose bound is at most upper: [rows]."""
    least = torch.full(rows.shape, torch.inf, dtype=torch.float64, device=x.device)
    index = torch.full(rows.shape, codes.codes.shape[0], device=x.device)
    for block in codes.blocks(torch.float64):
        start = 0
        for some in rows.split(codes.rows_beside(block)):
            x_some = codes.rows(x[some], torch.float64)
            lower = torch.addmm(block.offset, x_some, block.matrix.mT, alpha=-1)
            pairs = (~(lower > upper[some, None])).nonzero()
            for row, code in (p.unbind(1) for p in pairs.split(_PAIRS)):
                code = block.ids[code]
                pair = x.index_select(0, some[row]), codes.codes.index_select(0, code)
                _lower(least, index, row + start, code, _cost(*pair, codes.metric))
            start += some.shape[0]
    return index


def _cost(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    """As the reference has it, for pairs [P, d]."""
    x, codes = x.double(), codes.double()
    if metric == "l2":
        return (x - codes).square().sum(-1)
    products = (x * codes).sum(-1)
    if metric == "cosine":
        norms = codes.square().sum(-1).sqrt()
        products = torch.where(norms > 0, products / norms, 0.0)
    return -products


def _lower(least: Tensor, index: Tensor, row: Tensor, code: Tensor, cost: Tensor) -> None:
    """Lower each row's least cost; among equal ones the lowest code stays."""
    before = least.clone()
    least.scatter_reduce_(0, row, cost, "amin")
    index.masked_fill_(least < before, torch.iinfo(torch.int64).max)
    tie = (cost == least[row]).nonzero()[:, 0]
    index.scatter_reduce_(0, row[tie], code[tie], "amin")


def _finite(x: Tensor) -> Tensor:
    """Which rows of x [N, d] are finite, without a mask of x's size."""
    parts = [part.isfinite().all(-1) for part in x.split(_CODES)]
    return torch.cat(parts)


def _norm(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True).sqrt()
