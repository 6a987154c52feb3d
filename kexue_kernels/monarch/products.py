"""monarch_matmul and its parts: products with block-diagonal matrices."""

from torch import Tensor

from kexue_kernels import checks, dispatch, launchers
from kexue_kernels.monarch import arguments, operators, reference


def monarch_matmul(
    x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Rows times a Monarch matrix: block-diagonal, permutation, block-diagonal.

    z = einsum("kqp,bkp->bkq", w1, x.view(b, k, p)); z, flattened over (k q), is read as
    [b, r, l] with l fastest; y = einsum("lsr,brl->bsl", w2, z), flattened over (s l), l fastest.

    Args:
        x: rows [..., k*p]; float32, bfloat16, float16 or complex64 (float64 and complex128 are
            served by the reference).
        w1: k blocks [k, q, p], in `x`'s dtype.
        w2: l blocks [l, s, r] with l*r == k*q, in `x`'s dtype. l need not divide q.
        bias: added to each row, [s*l], in `x`'s dtype.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        y [..., s*l] in `x`'s dtype, contiguous. Sums are float32 (complex64) or better; z is
        rounded to `x`'s dtype, in which it never exists at once in a fused kernel.

    Differentiable in `x`, `w1`, `w2` and `bias`, any number of times. Training keeps `x` and the
    factors alone (not `x` where no factor needs a gradient). Sums over rows have a fixed order:
    the same inputs give bitwise the same results on the same device (on CPU also with the same
    number of threads). Under autocast, arguments are taken in its dtype, as in
    `torch.nn.functional.linear`.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a wrong shape, dtype, device or value, named.
        BackendUnavailableError: a forced backend that can't serve the call.

    Source: Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate
    Training" (2022), section 3; for rectangular factors, its appendix C.
    """
    arguments.tensors(x=x, w1=w1, w2=w2, bias=bias)
    x, w1, w2, bias = arguments.in_autocast_dtype(x, w1, w2, bias)
    arguments.rows(x, w1, "w1")
    arguments.second_factor(w1, w2)
    features = w2.shape[1] * w2.shape[0]
    arguments.bias(bias, x, features, "[s*l]")
    backend = dispatch.resolve(backend)
    if launchers.served_by_reference("monarch_matmul", x, backend):
        return reference.monarch_matmul(x, w1, w2, bias)
    y = operators.monarch_matmul(arguments.flat(x), w1, w2, bias, backend)
    return arguments.unflat(y, x)


def block_diag_matmul(
    x: Tensor, w: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Rows times a block-diagonal matrix, the first factor of `monarch_matmul` alone.

    einsum("kqp,bkp->bkq", w, x.view(b, k, p)), flattened over (k q), q fastest.

    Args:
        x: rows [..., k*p]; float32, bfloat16, float16 or complex64 (float64 and complex128 are
            served by the reference).
        w: k blocks [k, q, p], in `x`'s dtype.
        bias: added to each row, [k*q], in `x`'s dtype.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        [..., k*q] in `x`'s dtype, contiguous. Sums are float32 (complex64) or better.

    Differentiable in `x`, `w` and `bias`, any number of times. The same inputs give bitwise the
    same results on the same device (on CPU also with the same number of threads). Under autocast,
    arguments are taken in its dtype, as in `torch.nn.functional.linear`.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a wrong shape, dtype, device or value, named.
        BackendUnavailableError: a forced backend that can't serve the call.

    Source: as `monarch_matmul`.
    """
    arguments.tensors(x=x, w=w, bias=bias)
    x, w, bias = arguments.in_autocast_dtype(x, w, bias)
    arguments.rows(x, w, "w")
    features = w.shape[0] * w.shape[1]
    arguments.bias(bias, x, features, "[k*q]")
    backend = dispatch.resolve(backend)
    if launchers.served_by_reference("block_diag_matmul", x, backend):
        return reference.block_diag_matmul(x, w, bias)
    y = operators.block_diag_matmul(arguments.flat(x), w, bias, backend)
    return arguments.unflat(y, x)


def monarch_to_dense(w1: Tensor, w2: Tensor) -> Tensor:
    """The matrix W [s*l, k*p] that `monarch_matmul` multiplies by: y = x @ W.T.

    Args:
        w1: [k, q, p]; float32, bfloat16, float16, float64, complex64 or complex128.
        w2: [l, s, r] with l*r == k*q, in `w1`'s dtype.

    Returns:
        W in the factors' dtype, differentiable in both any number of times. Sums are float32
        (complex64) or better.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a wrong shape, dtype or device, named.

    Source: as `monarch_matmul`.
    """
    arguments.tensors(w1=w1, w2=w2)
    checks.dtype("w1", w1, checks.FLOATING)
    checks.ndim("w1", w1, 3, "[k, q, p]")
    arguments.second_factor(w1, w2)
    return reference.monarch_to_dense(w1, w2)
