"""codebook_statistics in PyTorch: rows sorted by code, summed by segments, block by block."""

from collections.abc import Callable

import torch
from torch import Tensor

_ROWS = 1 << 14


def statistics(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    counts, sums = segmented(lambda rows: x[rows], indices, num_codes, x.shape[1])
    return counts, sums.float()


def segmented(
    values: Callable[[Tensor], Tensor], indices: Tensor, num_codes: int, d: int
) -> tuple[Tensor, Tensor]:
    """How many rows each code has, and the float64 sum [K, d] of values(rows) [rows, d].

    The order of the additions depends on the indices alone.
    """
    kept = ((indices >= 0) & (indices < num_codes)).nonzero()[:, 0]
    by_code, order = indices[kept].sort(stable=True)
    counts = torch.zeros(num_codes, dtype=torch.int64, device=indices.device)
    sums = torch.zeros(num_codes, d, dtype=torch.float64, device=indices.device)
    if kept.numel() == 0:
        return counts, sums
    for rows, codes in zip(kept[order].split(_ROWS), by_code.split(_ROWS), strict=True):
        found, lengths = codes.unique_consecutive(return_counts=True)
        counts[found] += lengths
        sums[found] += torch.segment_reduce(values(rows).double(), "sum", lengths=lengths)
    return counts, sums
