"""vector_quantize: each row's nearest code, with a gradient for the row and one for the code."""

import math

import torch
from torch import Tensor

from kexue_kernels import dispatch, launchers
from kexue_kernels.vq import arguments, operators, reference
from kexue_kernels.vq.reference import VectorQuantized
from kexue_kernels.vq.search import nearest_codebook


def vector_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    gradient: str = "ste",
    precision: str = "exact",
    backend: str = "auto",
) -> VectorQuantized:
    """Replace each row by its nearest code; estimate the gradient of doing so.

    Args:
        x: rows [..., d], or [H, ..., d] for a codebook with heads; float32, bfloat16 or
            float16 (float64 is served by the reference).
        codebook: [K, d] or [H, K, d] with K >= 1, in `x`'s dtype.
        metric, precision: what is nearest, as in `kexue_kernels.nearest_codebook`.
        gradient: how the gradient g of `quantized` reaches x. "ste", straight through: dx = g.
            "rotation": as if x had been taken to its code q by a rotation and a scaling held
            constant. With u = x/|x|, p = q/|q|, w = (u + p)/|u + p|, s = |q|/|x|,
            dx = s (g - 2 w (w.g) + 2 u (p.g)); w = 0 where |u + p| < 1e-6; dx = g where
            |x| < 1e-6; elsewhere dx = 0 where q = 0.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        A named tuple:
        quantized: codebook[indices], bit for bit, in x's shape; NaN where the index is -1.
        indices: int64 [...], as `kexue_kernels.nearest_codebook` gives them.
        commitment_loss: mean((x - q)^2) over the rows with an index, a gradient for x alone.
        codebook_loss: the same number, a gradient for the codebook alone.
        Both losses are float32 scalars (float64 in float64), 0 where no row has an index.

    Differentiable once in `x`, from `quantized` and `commitment_loss` (a row with index -1
    gets 0), and in `codebook`, from `codebook_loss` alone; the reference any number of times.
    The same inputs give bitwise the same results on the same device. Under autocast, inputs of
    different dtypes are promoted.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a wrong shape, dtype, device or value, named.
        BackendUnavailableError: a forced backend that can't serve the call.

    Source: van den Oord et al., "Neural Discrete Representation Learning" (2017), equations 1
    to 3; Fifty et al., "Restructuring Vector Quantization with the Rotation Trick" (2024),
    section 4.
    """
    x, codebook = arguments.rows_and_codes(x, codebook)
    arguments.one_of("metric", metric, arguments.METRICS)
    arguments.one_of("gradient", gradient, arguments.GRADIENTS)
    arguments.one_of("precision", precision, arguments.PRECISIONS)
    backend = dispatch.resolve(backend)
    if launchers.served_by_reference("vector_quantize", x, backend):
        indices = nearest_codebook(x, codebook, metric=metric, precision=precision, backend=backend)
        return reference.quantized_by(x, codebook, indices, gradient)
    heads, d = codebook.shape[:-2], x.shape[-1]
    rows = x.reshape(*heads, math.prod(x.shape[len(heads) : -1]), d)  # copied once at most
    options = {"metric": metric, "precision": precision, "backend": backend}
    indices = nearest_codebook(rows, codebook, **options)
    quantized, commitment_loss, codebook_loss = operators.vector_quantize(
        rows.reshape(indices.numel(), d),
        codebook.reshape(math.prod(codebook.shape[:-1]), d),
        _in_all_heads(indices, codebook).reshape(indices.numel()),
        gradient,
        backend,
    )
    indices = indices.view(x.shape[:-1])
    return VectorQuantized(quantized.view(x.shape), indices, commitment_loss, codebook_loss)


def _in_all_heads(indices: Tensor, codebook: Tensor) -> Tensor:
    """Indices [H, N] into the heads' codes one after the other: [H K, d]."""
    if codebook.ndim == 2:
        return indices
    H, K, _ = codebook.shape
    first = torch.arange(0, H * K, K, device=indices.device)[:, None]
    return torch.where(indices >= 0, indices + first, -1)
