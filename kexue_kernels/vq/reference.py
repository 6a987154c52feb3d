"""The vq family in plain PyTorch: the formulas as the papers write them down."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kexue_kernels.checks import state_dtype
from kexue_kernels.vq import arguments

_BLOCK = 1 << 20  # elements [rows, K, d] that exist at once
_SMALL = 1e-6  # norms below which a direction means nothing


class VectorQuantized(NamedTuple):
    """What `vector_quantize` returns."""

    quantized: Tensor
    indices: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor


def nearest_codebook(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    precision: str = "exact",  # noqa: ARG001  "exact" serves both
) -> Tensor:
    """The float64 argmin, by the definition. See `kexue_kernels.nearest_codebook`."""
    x, codebook = x.detach(), codebook.detach()
    if codebook.ndim == 3:
        heads = zip(x, codebook, strict=True)
        found = [nearest_codebook(x_h, codes_h, metric=metric) for x_h, codes_h in heads]
        return torch.stack(found) if found else _no_indices(x)
    valid = codebook.isfinite().all(-1).nonzero()[:, 0]  # ascending
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if rows.shape[0] == 0 or valid.shape[0] == 0:
        return _no_indices(x)
    codes = codebook[valid].double()
    per_block = max(1, _BLOCK // max(1, codes.numel()))
    nearest = [_costs(block.double(), codes, metric).argmin(-1) for block in rows.split(per_block)]
    indices = valid[torch.cat(nearest)]
    return indices.masked_fill(~rows.isfinite().all(-1), -1).view(x.shape[:-1])


def _costs(x: Tensor, codes: Tensor, metric: str) -> Tensor:
    """What the nearest code has least of: [N, K]. Equal codes have equal costs, bit for bit."""
    if metric == "l2":
        return (x[:, None] - codes).square().sum(-1)
    products = (x[:, None] * codes).sum(-1)
    if metric == "cosine":
        norms = codes.square().sum(-1).sqrt()
        products = torch.where(norms > 0, products / norms, 0.0)
    return -products


def _no_indices(x: Tensor) -> Tensor:
    return torch.full(x.shape[:-1], -1, dtype=torch.int64, device=x.device)


def vector_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    gradient: str = "ste",
    precision: str = "exact",
) -> VectorQuantized:
    """Each row's nearest code, with a gradient. See `kexue_kernels.vector_quantize`."""
    indices = nearest_codebook(x, codebook, metric=metric, precision=precision)
    return quantized_by(x, codebook, indices, gradient)


def quantized_by(x: Tensor, codebook: Tensor, indices: Tensor, gradient: str) -> VectorQuantized:
    """`vector_quantize` with the nearest codes' indices [...] given."""
    valid = (indices >= 0)[..., None]
    wide = state_dtype(x.dtype)
    codes = codes_at(codebook.to(wide), indices.clamp(min=0))  # [..., d]; its gradient is a sum
    q = torch.where(valid, codes, 0)
    kept = torch.where(valid, x, 0).to(wide)  # zero where there is no code: no gradient
    quantized = Replace.apply(estimate(kept, q.detach(), gradient), codes.detach().to(x.dtype))
    quantized = torch.where(valid, quantized, torch.nan)
    terms = (valid.sum() * x.shape[-1]).clamp(min=1)
    commitment_loss = (kept - q.detach()).square().sum() / terms
    codebook_loss = (kept.detach() - q).square().sum() / terms
    return VectorQuantized(quantized, indices, commitment_loss, codebook_loss)


def codes_at(codebook: Tensor, indices: Tensor) -> Tensor:
    """codebook [K, d] at indices [...], or [H, K, d] at [H, ...]; in range."""
    if codebook.ndim == 3:
        H, K, _ = codebook.shape
        heads = torch.arange(H, device=indices.device).view(H, *(1,) * (indices.ndim - 1))
        return codes_at(codebook.flatten(0, 1), indices + K * heads)
    found = codebook.index_select(0, indices.reshape(-1))  # its gradient is added in order
    return found.view(*indices.shape, codebook.shape[-1])


class Replace(torch.autograd.Function):
    """The value of the second argument, bit for bit; the gradient goes to the first."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, value: Tensor) -> Tensor:  # noqa: ARG004
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


def estimate(x: Tensor, q: Tensor, gradient: str) -> Tensor:
    """What is differentiated in place of the jump from x [..., d] to its code q.

    "ste" (van den Oord et al. 2017, section 3.2): x itself. "rotation" (Fifty et al. 2024,
    section 4.2): the scaled rotation that takes x to q, held constant; x where x has no
    direction.
    """
    if gradient == "ste":
        return x
    with torch.no_grad():
        u, p, w, s, is_short = rotation(x, q)
    rotated = x - 2 * w * (w * x).sum(-1, keepdim=True) + 2 * p * (u * x).sum(-1, keepdim=True)
    return torch.where(is_short, x, s * rotated)


def rotation(x: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    """Of rows [..., d]: u = x / |x|, p = q / |q| (0 of 0), w = (u + p) / |u + p|, s = |q| / |x|
    [..., 1], and where x is too short to have a direction."""
    x_norm, q_norm = norm(x), norm(q)
    is_short = x_norm < _SMALL
    u = (x / x_norm.clamp(min=_SMALL)).to(x.dtype)
    p = torch.where(q_norm > 0, q / q_norm, 0).to(x.dtype)
    w = u + p
    w = torch.where(norm(w) < _SMALL, 0, w / norm(w)).to(x.dtype)
    s = torch.where(is_short, 1, q_norm / x_norm.clamp(min=_SMALL)).to(x.dtype)
    return u, p, w, s, is_short


def norm(x: Tensor) -> Tensor:
    """In float64, where no square of a float32 overflows."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)


def codebook_statistics(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """How many rows each code has, and their sum. See `kexue_kernels.codebook_statistics`."""
    arguments.indices_in_range(indices, num_codes)
    rows = x.detach().reshape(indices.numel(), x.shape[-1]).to(state_dtype(x.dtype))
    indices = indices.reshape(-1).long()
    kept = (indices >= 0) & (indices < num_codes)
    counts = torch.bincount(indices[kept], minlength=num_codes)
    sums = rows.new_zeros(num_codes, x.shape[-1])
    return counts, sums.index_add(0, indices[kept], rows[kept])


@torch.no_grad()
def ema_update_(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_sum: Tensor,
    x: Tensor,
    indices: Tensor,
    *,
    decay: float,
    eps: float = 1e-5,
) -> Tensor:
    """A step of the codebook towards its rows' mean. See `kexue_kernels.ema_update_`."""
    counts, sums = codebook_statistics(x, indices, codebook.shape[0])
    return ema_step_(codebook, cluster_size, embed_sum, counts, sums, decay, eps)


@torch.no_grad()
def ema_step_(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_sum: Tensor,
    counts: Tensor,
    sums: Tensor,
    decay: float,
    eps: float,
) -> Tensor:
    """Razavi et al. (2019), equation 2, with Laplace smoothing; [..., K, d] and [..., K]."""
    cluster_size.lerp_(counts.to(cluster_size.dtype), 1 - decay)
    embed_sum.lerp_(sums.to(embed_sum.dtype), 1 - decay)
    total = cluster_size.sum(-1, keepdim=True)
    smoothed = (cluster_size + eps) / (total + cluster_size.shape[-1] * eps) * total
    means = embed_sum / smoothed[..., None]
    means = means.to(codebook.dtype)  # copy_ to another dtype may miss that a half is negated
    return codebook.copy_(torch.where(smoothed[..., None] > 0, means, codebook))


def fsq(
    x: Tensor, levels: Sequence[int], *, preserve_symmetry: bool = False
) -> tuple[Tensor, Tensor]:
    """Rounding of bounded channels (Mentzer et al. 2023). See `kexue_kernels.fsq`."""
    z = x.to(state_dtype(x.dtype))
    L = z.new_tensor(levels)
    if preserve_symmetry:  # Parker et al. 2024, section 3.2
        places = (L - 1) * (torch.tanh(z) + 1) / 2 + 0.5
        places = Replace.apply(places, places.floor())
        quantized = places * (2 / (L - 1)) - 1
    else:
        half_l = (L - 1) * (1 + 1e-3) / 2
        offset = torch.where(L % 2 == 0, 0.5, 0.0)
        bounded = torch.tanh(z + torch.atanh(offset / half_l)) * half_l - offset
        rounded = bounded.round().clamp(-(L // 2), (L - 1) // 2)  # 1 + 1e-3 goes too far at 1001
        bounded = Replace.apply(bounded, rounded)
        quantized = bounded / (L // 2)
        places = bounded + L // 2
    return quantized.to(x.dtype), _mixed_radix(places.detach(), L)


def _mixed_radix(places: Tensor, L: Tensor) -> Tensor:
    """The number whose digits are `places` [..., n], the first counting ones; -1 for a NaN."""
    basis = torch.cat([L.new_ones(1), L[:-1]]).long().cumprod(0)
    indices = (places.nan_to_num().long() * basis).sum(-1)
    return indices.masked_fill(places.isnan().any(-1), -1)
