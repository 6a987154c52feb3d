"""vector_quantize's kernels: codes for rows with the losses' sums, and the rows' gradient."""

import triton
import triton.language as tl

from kexue_kernels.triton_common import inline
from kexue_kernels.vq.triton_codebook_statistics_kernel import factor_of

SMALL = tl.constexpr(1e-6)  # norms below which a direction means nothing


@inline
def _rows(indices_ptr, N, K, ROWS: tl.constexpr):
    """This program's rows [ROWS, 1], which exist, their codes, and which have one."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    codes = tl.load(indices_ptr + rows, mask=rows < N, other=-1)
    return rows, rows < N, codes, (codes >= 0) & (codes < K)


@triton.jit(do_not_specialize=["N", "K"])
def forward_kernel(
    x_ptr, codebook_ptr, indices_ptr, quantized_ptr, squares_ptr, counts_ptr, N, K, d,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """quantized [N, d], and for each program's rows the sum of (x - q)^2 and how many have a q."""
    rows, real, codes, valid = _rows(indices_ptr, N, K, ROWS)
    squares = tl.zeros((ROWS, BLOCK_D), tl.float32)
    start = 0
    while start < d:
        columns = start + tl.arange(0, BLOCK_D)[None, :]
        held = valid & (columns < d)
        q = tl.load(codebook_ptr + codes * d + columns, mask=held, other=float("nan"))
        x = tl.load(x_ptr + rows * d + columns, mask=held, other=0).to(tl.float32)
        tl.store(quantized_ptr + rows * d + columns, q, mask=real & (columns < d))
        difference = tl.where(held, x - q.to(tl.float32), 0)
        squares += difference * difference
        start += BLOCK_D
    tl.store(squares_ptr + tl.program_id(0), tl.sum(squares))
    tl.store(counts_ptr + tl.program_id(0), tl.sum(valid.to(tl.int32)))


@triton.jit(do_not_specialize=["programs"])
def mean_kernel(squares_ptr, counts_ptr, mean_ptr, programs, d, BLOCK: tl.constexpr):
    """The mean square, from what the programs of `forward_kernel` left; 0 of no rows."""
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int64)
    start = 0
    while start < programs:
        at = start + tl.arange(0, BLOCK)
        total += tl.load(squares_ptr + at, mask=at < programs, other=0)
        count += tl.load(counts_ptr + at, mask=at < programs, other=0)
        start += BLOCK
    terms = tl.maximum(tl.sum(count) * d, 1)
    tl.store(mean_ptr, tl.sum(total) / terms.to(tl.float32))


@inline
def _per(x):
    """1 / x [ROWS, 1]; 0 for 0."""
    return tl.where(x > 0, 1 / tl.where(x > 0, x, 1), 0)


@inline
def _sums(x):
    """Of each row: [ROWS, 1]."""
    return tl.sum(x, 1, keep_dims=True)


@inline
def _triple(data, start, BLOCK_D: tl.constexpr):
    """x, q and g [ROWS, BLOCK_D], the channels from `start` on; zeros where there are none."""
    x_ptrs, q_ptrs, g_ptrs, g_column, valid, d = data
    columns = start + tl.arange(0, BLOCK_D)[None, :]
    held = valid & (columns < d)
    x = tl.load(x_ptrs + columns, mask=held, other=0).to(tl.float32)
    q = tl.load(q_ptrs + columns, mask=held, other=0).to(tl.float32)
    g = tl.load(g_ptrs + columns.to(tl.int64) * g_column, mask=held, other=0).to(tl.float32)
    return x, q, g


# With u = x / |x| and p = q / |q| the rotation passes s (g - 2 w (w.g) / |w|^2 + 2 u (p.g)), w
# being any multiple of u + p. Here w = x + ratio q, ratio = |x| / |q|. Where u is nearly -p that
# turns with the ratio's rounding error. But w is orthogonal to x - ratio q: what it has of that
# is the error, which is taken out again, up to its square.


@inline
def _bisector(x, q, ratio, correction):
    return tl.fma(correction, q, tl.fma(ratio, q, x))


@inline
def _norms(xx, qq):
    """|x|, |q| and their ratio; 0 where |q| is."""
    return tl.sqrt(xx), tl.sqrt(qq), tl.sqrt(xx) * _per(tl.sqrt(qq))


@inline
def _error(x, q, ratio):
    """What sums to w.(x - ratio q)."""
    return tl.fma(ratio, q, x) * (x - ratio * q)


@inline
def _along(ww, wg, qg, x_norm, q_norm):
    """What the rotation adds to g: how much of w, and of x."""
    opposite = tl.sqrt(ww) < x_norm * SMALL
    return tl.where(opposite, 0, -2 * wg * _per(ww)), 2 * qg * _per(q_norm) * _per(x_norm)


@inline
def _turn(x, q, g):
    """How to rotate g: ratio, correction, |x|, |q|, how much of w and of x to add."""
    x_norm, q_norm, ratio = _norms(_sums(x * x), _sums(q * q))
    correction = _sums(_error(x, q, ratio)) * _per(2 * x_norm * x_norm) * ratio
    w = _bisector(x, q, ratio, correction)
    along_w, along_x = _along(_sums(w * w), _sums(w * g), _sums(q * g), x_norm, q_norm)
    return ratio, correction, x_norm, q_norm, along_w, along_x


@inline
def _turn_in_parts(data, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """`_turn` of rows too long to be held: read again for each of the sums that need the last."""
    d = data[5]
    zeros = tl.zeros((ROWS, BLOCK_D), tl.float32)
    xx, qq, qg, error, ww, wg = zeros, zeros, zeros, zeros, zeros, zeros
    start = 0
    while start < d:
        x, q, g = _triple(data, start, BLOCK_D)
        xx += x * x
        qq += q * q
        qg += q * g
        start += BLOCK_D
    x_norm, q_norm, ratio = _norms(_sums(xx), _sums(qq))
    start = 0
    while start < d:
        x, q, g = _triple(data, start, BLOCK_D)
        error += _error(x, q, ratio)
        start += BLOCK_D
    correction = _sums(error) * _per(2 * x_norm * x_norm) * ratio
    start = 0
    while start < d:
        x, q, g = _triple(data, start, BLOCK_D)
        w = _bisector(x, q, ratio, correction)
        ww += w * w
        wg += w * g
        start += BLOCK_D
    along_w, along_x = _along(_sums(ww), _sums(wg), _sums(qg), x_norm, q_norm)
    return ratio, correction, x_norm, q_norm, along_w, along_x


@inline
def _gradient(x, q, g, turn, factor):
    """dx of x, q and g: what passes of g, rotated with a `turn`, and what the loss adds."""
    if len(turn) > 0:
        ratio, correction, x_norm, q_norm, along_w, along_x = turn
        w = _bisector(x, q, ratio, correction)
        turned = q_norm / tl.maximum(x_norm, SMALL) * (g + along_w * w + along_x * x)
        g = tl.where(x_norm < SMALL, g, turned)
    return tl.fma(factor, x - q, g)


@triton.jit(do_not_specialize=["N", "K"])
def backward_kernel(
    g_ptr, x_ptr, codebook_ptr, indices_ptr, scale_ptr, terms_ptr, grad_ptr, N, K, d,
    g_row, g_column, ROTATION: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad [N, d] of x from the gradient g of quantized (by strides) and of the mean square.

    WHOLE: BLOCK_D channels are all there are.
    """
    rows, real, codes, valid = _rows(indices_ptr, N, K, ROWS)
    factor = factor_of(scale_ptr, terms_ptr, d)
    data = (
        x_ptr + rows * d, codebook_ptr + codes * d, g_ptr + rows * g_row, g_column, valid, d
    )  # fmt: skip
    grad_ptrs = grad_ptr + rows * d
    columns = tl.arange(0, BLOCK_D)[None, :]
    turn = ()
    if WHOLE:
        x, q, g = _triple(data, 0, BLOCK_D)
        if ROTATION:
            turn = _turn(x, q, g)
        grad = tl.where(valid, _gradient(x, q, g, turn, factor), 0)
        held = real & (columns < d)
        tl.store(grad_ptrs + columns, grad.to(grad_ptr.dtype.element_ty), mask=held)
    else:
        if ROTATION:
            turn = _turn_in_parts(data, ROWS, BLOCK_D)
        start = 0
        while start < d:
            x, q, g = _triple(data, start, BLOCK_D)
            grad = tl.where(valid, _gradient(x, q, g, turn, factor), 0)
            held = real & (start + columns < d)
            tl.store(grad_ptrs + start + columns, grad.to(grad_ptr.dtype.element_ty), mask=held)
            start += BLOCK_D
