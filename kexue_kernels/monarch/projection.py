"""project_to_monarch: the nearest Monarch to a matrix, from the best low rank of each block."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kexue_kernels import checks, options
from kexue_kernels.autocast import without_autocast
from kexue_kernels.monarch import arguments

_CHUNK = 1 << 24  # elements whose factors are sought at once: bounds what the solvers allocate
_THIN = 2  # a block's length over its width from which Gram is faster on CPU, as measured


def project_to_monarch(
    weight: Tensor, nblocks: int | tuple[int, int], rank: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest Monarch in Frobenius norm: (w1, w2, relative_error).

    A Monarch's entries at rows o with o mod l = j and in the columns of input block i form a
    matrix of rank at most `rank`, and no two of these k l matrices share a parameter. So each is
    the truncated SVD of the weight's own block, its singular values shared evenly by the factors.

    Args:
        weight: [out, in]; float32, bfloat16, float16, float64, complex64 or complex128.
        nblocks: the blocks (k, l) of the two factors, or an int for both. k divides in, l
            divides out.
        rank: of each block; from 1 to min(in / k, out / l), where nothing is lost.

    Returns:
        w1 [k, l * rank, in / k] and w2 [l, out / l, k * rank], in `weight`'s dtype, with
        y = monarch_matmul(x, w1, w2) nearest to y = x @ weight.T; and relative_error =
        |weight - M| / |weight| of the very factors returned, a real 0-dim tensor on `weight`'s
        device, float32 (float64 for a double weight). It is 0 for a weight of zeros.

    Halves are computed in float32. What the factors lose beyond the nearest Monarch is at the
    level of the computing dtype, whichever method finds them: an SVD of all blocks, or where that
    is slow (thin blocks, and any on a GPU) eigenvectors of their Gram matrices in float64.
    Takes its input detached: no gradient flows through. On the meta device results have shapes
    and dtypes alone.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a shape, dtype, nblocks or rank that doesn't fit, or a weight that is not
            finite, named.

    Source: Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate
    Training" (2022), section 3.3.
    """
    checks.tensor("weight", weight)
    checks.dtype("weight", weight, checks.FLOATING)
    checks.ndim("weight", weight, 2, "[out, in]")
    out_features, in_features = weight.shape
    k, l = checked_nblocks(nblocks, in_features, out_features)
    arguments.check_rank(rank, out_features // l, in_features // k)
    return nearest_monarch(weight, k, l, k * l * rank)


@without_autocast
def nearest_monarch(weight: Tensor, k: int, l: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest Monarch with w1 [k, hidden / k, in / k] and w2 [l, out / l, hidden / l].

    `hidden` is a common multiple of k and l. Hidden unit m joins input block m // (hidden / k) to
    output block m mod l: where l doesn't divide hidden / k some pairs of blocks have one unit,
    and so one rank, more than others. Units beyond a pair's full rank are zero.
    """
    if not weight.is_meta and not weight.isfinite().all():
        raise ValueError("weight: expected finite values, got NaN or infinity")
    blocks, root = _scaled_blocks(weight.detach(), k, l)  # [l, k, s, p]
    q = hidden // k
    rank = -(-q // l)
    left, right = _factors(blocks.flatten(0, 1), min(rank, *blocks.shape[-2:]))
    left = F.pad(left, (0, rank - left.shape[-1])).unflatten(0, (l, k))  # [l, k, s, a]
    right = F.pad(right, (0, 0, 0, rank - right.shape[-2])).unflatten(0, (l, k))  # [l, k, a, p]
    left = (left * root).to(weight.dtype)
    right = (right * root).to(weight.dtype)
    used = _used_ranks(k, l, q, rank, weight.device)
    error = _relative_error(blocks, left * used[..., None, :] / root, right / root)
    return *_placed(left, right, q), error


def checked_nblocks(nblocks: object, in_features: int, out_features: int) -> tuple[int, int]:
    """(k, l), or a TypeError or ValueError that names nblocks."""
    pair = nblocks if isinstance(nblocks, tuple | list) else (nblocks, nblocks)
    if len(pair) != 2:
        raise ValueError(f"nblocks: expected an int or a pair (k, l), got {nblocks!r}")
    k, l = pair
    for name, count, side, size in (("k", k, "in", in_features), ("l", l, "out", out_features)):
        options.integer(f"nblocks ({name})", count)
        if size % count:
            raise ValueError(f"nblocks: expected {name} to divide {side} = {size}, got {count}")
    return k, l


def _scaled_blocks(weight: Tensor, k: int, l: int) -> tuple[Tensor, Tensor]:
    """Blocks [l, k, s, p] of weight / root^2, near 1: no square of theirs over- or underflows.

    root is a power of two, so that it changes no digit.
    """
    wide = weight.to(checks.state_dtype(weight.dtype))
    parts = torch.view_as_real(wide.resolve_conj()) if wide.is_complex() else wide
    _, exponent = torch.frexp(parts.abs().max())  # |a + bi| itself could overflow
    root = torch.ldexp(torch.ones_like(exponent, dtype=wide.real.dtype), exponent // 2)
    s, p = weight.shape[0] // l, weight.shape[1] // k
    return wide.reshape(s, l, k, p).permute(1, 2, 0, 3) / root / root, root


def _factors(blocks: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Balanced factors [n, s, rank] and [n, rank, p] of the nearest matrices of that rank."""
    find = _by_gram if _gram_is_faster(blocks) else _by_svd
    per_chunk = max(1, _CHUNK // max(1, blocks[0].numel()))
    found = [find(chunk, rank) for chunk in blocks.split(per_chunk)]
    left, right = zip(*found, strict=True)
    return torch.cat(left), torch.cat(right)


def _gram_is_faster(blocks: Tensor) -> bool:
    """Where its squared condition number can be paid for: it needs a dtype twice as precise."""
    if blocks.dtype in checks.DOUBLE or blocks.device.type not in ("cpu", "cuda"):
        return False
    short, long = sorted(blocks.shape[-2:])
    return blocks.device.type == "cuda" or long >= _THIN * short


def _by_svd(blocks: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, sigma, v = torch.linalg.svd(blocks, full_matrices=False)
    root = sigma[:, :rank].sqrt()
    return u[..., :rank] * root[:, None], root[..., None] * v[:, :rank]


def _by_gram(blocks: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """From eigenvectors of B^H B, of B B^H for wide blocks; in float64 or complex128.

    Squared singular values lose those below sqrt(eps) of the largest: in float64 that is 1e-8,
    under the rounding of float32.
    """
    if blocks.shape[-2] < blocks.shape[-1]:
        left, right = _by_gram(blocks.mH, rank)
        return right.mH, left.mH
    wide = blocks.to(torch.complex128 if blocks.is_complex() else torch.float64)
    _, vectors = torch.linalg.eigh(wide.mH @ wide)  # ascending
    v = vectors[..., -rank:]
    image = wide @ v
    root = torch.linalg.vector_norm(image, dim=-2, keepdim=True).sqrt()  # of singular values
    left = torch.where(root > 0, image / root, 0)
    return left.to(blocks.dtype), (v * root).mH.to(blocks.dtype)


def _used_ranks(k: int, l: int, q: int, rank: int, device: torch.device) -> Tensor:
    """Which of a block's ranks have a hidden unit: bool [l, k, rank]."""
    i = torch.arange(k, device=device)
    j = torch.arange(l, device=device)[:, None]
    first = (j - i * q) % l  # of block i's units, the first that output block j reads
    return first[..., None] + l * torch.arange(rank, device=device) < q


def _relative_error(blocks: Tensor, left: Tensor, right: Tensor) -> Tensor:
    residual = blocks - left.to(blocks.dtype) @ right.to(blocks.dtype)
    norm = torch.linalg.vector_norm(blocks)
    return torch.where(norm > 0, torch.linalg.vector_norm(residual) / norm, 0)


def _placed(left: Tensor, right: Tensor, q: int) -> tuple[Tensor, Tensor]:
    """w1 [k, q, p] and w2 [l, s, r] from left [l, k, s, a] and right [l, k, a, p]."""
    l, k = left.shape[:2]
    m = torch.arange(k * q, device=left.device)
    i, j, a = m // q, m % l, m % q // l
    w1 = right[j, i, a].unflatten(0, (k, q))
    w2 = left[j, i, :, a].unflatten(0, (-1, l)).permute(1, 2, 0)
    return w1, w2.contiguous()
