"""What keeps a codebook in use: rows of the batch as codes, k-means, sums over all ranks."""

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from kexue_kernels.vq import codebook_statistics, nearest_codebook


def is_shared(sync: bool | None) -> bool:
    """Whether other ranks see other rows of the same batch."""
    if sync is False or not (distributed.is_available() and distributed.is_initialized()):
        return False
    return distributed.get_world_size() > 1


def summed(x: Tensor, shared: bool) -> Tensor:
    """The sum over all ranks, in place."""
    if shared:
        distributed.all_reduce(x)
    return x


def unit(x: Tensor) -> Tensor:
    """x scaled to norm 1; as in vector-quantize-pytorch, nearly zero rows stay short.

    A row that is not finite becomes NaN, and gets no gradient.
    """
    finite = x.isfinite().all(-1, keepdim=True)
    scaled = F.normalize(torch.where(finite, x, 0), dim=-1, eps=1e-6)
    return torch.where(finite, scaled, torch.nan)


def counts_of(indices: Tensor, num_codes: int) -> Tensor:
    """How often each code was chosen: [G, K] of indices [G, N]; -1 is not counted."""
    G = indices.shape[0]
    joined = _joined(indices, num_codes, G * num_codes).reshape(-1)
    counts = indices.new_zeros(G * num_codes + 1)
    return counts.scatter_add_(0, joined, torch.ones_like(joined))[:-1].view(G, num_codes)


def _joined(indices: Tensor, num_codes: int, none: int) -> Tensor:
    """Indices [G, N] into all groups' codes, one group after the other; `none` for -1."""
    first = torch.arange(0, indices.shape[0] * num_codes, num_codes, device=indices.device)
    return torch.where(indices >= 0, indices + first[:, None], none)


def statistics_of(
    rows: Tensor, indices: Tensor, num_codes: int, backend: str
) -> tuple[Tensor, Tensor]:
    """counts [G, K] and sums [G, K, d] of rows [G, N, d] by indices [G, N]."""
    G = rows.shape[0]
    joined = _joined(indices, num_codes, -1)
    counts, sums = codebook_statistics(rows, joined, G * num_codes, backend=backend)
    return counts.view(G, num_codes), sums.view(G, num_codes, -1)


def drawn(rows: Tensor, wanted: Tensor, shared: bool, again: bool) -> tuple[Tensor, Tensor]:
    """Random rows for the wanted codes.

    Args:
        rows: [G, N, d]; those that are not finite are never taken.
        wanted: bool [G, K].
        shared: every rank gives its part, and all get the same.
        again: take rows more than once where there are too few.

    Returns:
        values [G, K, d], and which codes got one, bool [G, K]. Nothing is read back from the
        device.
    """
    rank, ranks = (distributed.get_rank(), distributed.get_world_size()) if shared else (0, 1)
    if rows.shape[1] == 0:
        rows = rows.new_full((rows.shape[0], 1, rows.shape[2]), torch.nan)
    finite = rows.isfinite().all(-1)
    places = torch.rand(finite.shape, device=rows.device) + 2 * ~finite
    shuffled = places.argsort(dim=-1, stable=True)
    available = finite.sum(-1, keepdim=True)
    place = wanted.cumsum(-1) - 1  # among the wanted: rank r serves each `ranks`-th
    turn = place // ranks
    if again:
        turn = turn % available.clamp(min=1)
    served = wanted & (place % ranks == rank) & (turn < available)
    at = shuffled.gather(1, turn.clamp(0, rows.shape[1] - 1))
    values = rows.gather(1, at[..., None].expand(-1, -1, rows.shape[2]))
    values = summed(torch.where(served[..., None], values, 0), shared)
    return values, summed(served.int(), shared) > 0


def k_means(
    rows: Tensor, codes: Tensor, iterations: int, metric: str, shared: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from random rows: codes [G, K, d], and how many rows each has [G, K]."""
    values, got = drawn(rows, torch.ones_like(codes[..., 0], dtype=torch.bool), shared, again=True)
    codes = torch.where(got[..., None], values, codes)
    counts = torch.zeros_like(got, dtype=torch.int64)
    for _ in range(iterations):
        indices = nearest_codebook(rows, codes, metric=metric, backend=backend)
        counts, sums = statistics_of(rows, indices, codes.shape[1], backend)
        counts, sums = summed(counts, shared), summed(sums, shared)
        means = sums / counts.clamp(min=1)[..., None]
        means = unit(means) if metric == "cosine" else means
        codes = torch.where(counts[..., None] > 0, means.to(codes.dtype), codes)
    return codes, counts
