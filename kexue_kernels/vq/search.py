"""nearest_codebook: which code is nearest to each row."""

import math

from torch import Tensor

from kexue_kernels import dispatch
from kexue_kernels.vq import arguments, operators


def nearest_codebook(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    precision: str = "exact",
    backend: str = "auto",
) -> Tensor:
    """The index of each row's nearest code, without a matrix of rows by codes.

    Args:
        x: rows [..., d], or [H, ..., d] for a codebook with heads; float32, bfloat16 or
            float16 (float64 is served by the reference). Any strides; a copy is made where
            the leading axes can't be viewed as one.
        codebook: [K, d] or [H, K, d] with K >= 1, in `x`'s dtype.
        metric: "l2", the smallest |x - c|; "cosine", the largest x.c / |c|, where a zero code
            counts 0 and a zero row gets the lowest index; "dot", the largest x.c.
        precision: "exact", the argmin in float64 over the given values: equal codes always
            tie, and ties go to the lowest index, on every backend. "fast", whatever the
            device's matrix unit gives: near ties may go either way.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        int64 [...] (with heads [H, ...]). A row with a NaN or an infinity gives -1; a code
        with one is never chosen; with no finite code every index is -1.

    Memory beyond inputs and output is O(N + K) for N rows. Inputs are taken detached. The same
    inputs give the same indices. Under autocast, inputs of different dtypes are promoted.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a wrong shape, dtype, device or value, named.
        BackendUnavailableError: a forced backend that can't serve the call.

    Source: van den Oord et al., "Neural Discrete Representation Learning" (2017), equation 1.
    """
    x, codebook = arguments.rows_and_codes(x, codebook)
    arguments.one_of("metric", metric, arguments.METRICS)
    arguments.one_of("precision", precision, arguments.PRECISIONS)
    backend = dispatch.resolve(backend)
    indices = operators.nearest_codebook(
        heads_and_rows(x, codebook),
        codebook.detach() if codebook.ndim == 3 else codebook.detach()[None],
        metric,
        precision,
        backend,
    )
    return indices.view(x.shape[:-1])


def heads_and_rows(x: Tensor, codebook: Tensor) -> Tensor:
    """x as [H, N, d], H being 1 for a codebook without heads; detached."""
    heads = codebook.shape[0] if codebook.ndim == 3 else 1
    rows = math.prod(x.shape[codebook.ndim - 2 : -1])
    return x.detach().reshape(heads, rows, x.shape[-1])
