"""What the Triton kernels of nearest_codebook share: operands, products, and bounds.

The score of row n and code k is s = bias_k - scale_k X_n.c_k, least for the nearest code. X is the
row, CENTRED less the codes' mean m; bias is |c - m|^2 / 2 for l2, else 0, NaN for a code that is
not finite, and infinite for one so long that float32 might overflow; scale is 1 / |c| for cosine,
else left out. The README proves that s is within

    E = length_t e_n + weight_t + f_n

of the true score: of each tile t of codes there are the largest length and E's share of the
largest bias, of each row e_n and f_n. In every name N counts rows, K codes and D channels.
"""

import triton.language as tl

from kexue_kernels import dispatch
from kexue_kernels.triton_common import inline

LONGEST = tl.constexpr(2.0**60)  # of rows and codes: products and squares of others are finite
NONE = tl.constexpr(2.0**125)  # the score of a code that is not there; others are below 2**121
SLACK = tl.constexpr(1.01)  # for bounds that are themselves rounded
FLOOR = tl.constexpr(2.0**-60)  # per channel: lengths whose squares are below the normal numbers
INFINITY = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))


@inline
def load_channels(ptrs, stride, first, d, BLOCK_D: tl.constexpr, EVEN: tl.constexpr):
    """[R, BLOCK_D] from channel `first` on of the rows whose pointers are [R, 1]."""
    channels = first + tl.arange(0, BLOCK_D)[None, :]
    ptrs = ptrs + channels.to(tl.int64) * stride
    if EVEN:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=channels < d, other=0.0)


@inline
def centred(x, mean_ptr, first, d, BLOCK_D: tl.constexpr, CENTRED: tl.constexpr):
    """float32 x [R, BLOCK_D], less the mean from channel `first` on."""
    x = x.to(tl.float32)
    if CENTRED:
        channels = first + tl.arange(0, BLOCK_D)
        x -= tl.load(mean_ptr + channels, mask=channels < d, other=0.0)[None, :]
    return x


@inline
def halves(x):
    """Two bfloat16 that make up a float32, all but 2**-16 of it."""
    high = x.to(tl.bfloat16)
    return (high, (x - high.to(tl.float32)).to(tl.bfloat16))


@inline
def row_operands(
    x, mean_ptr, first, d, BLOCK_D: tl.constexpr, CENTRED: tl.constexpr, SINGLE: tl.constexpr
):
    """What is multiplied in place of a block of rows."""
    if SINGLE:
        return halves(centred(x, mean_ptr, first, d, BLOCK_D, CENTRED))
    elif CENTRED:
        return (centred(x, mean_ptr, first, d, BLOCK_D, True).to(x.dtype),)
    else:
        return (x,)


@inline
def code_operands(
    c, mean_ptr, first, d, BLOCK_D: tl.constexpr, CENTRED: tl.constexpr, SINGLE: tl.constexpr
):
    """In place of a block of codes: half-precision ones are not centred, X.m is all codes'."""
    if SINGLE:
        return halves(centred(c, mean_ptr, first, d, BLOCK_D, CENTRED))
    else:
        return (c,)


def _dot_exactly(x, y, sums):
    return tl.dot(x.to(tl.float32), y.to(tl.float32), sums, input_precision="ieee")


def _dot(x, y, sums):
    return tl.dot(x, y, sums)


# Triton's interpreter computes products of bfloat16 wrongly.
dot = _dot_exactly if dispatch.interpreting() else inline(_dot)


@inline
def multiply(x, c, sums):
    """sums [N, K] + x [N, D] c [K, D]^T, small terms first."""
    if len(x) == 2:
        sums = dot(x[1], tl.trans(c[0]), sums)
        sums = dot(x[0], tl.trans(c[1]), sums)
    return dot(x[0], tl.trans(c[0]), sums)


@inline
def products(
    resident, x_ptrs, c_ptrs, x_channel, c_channel, mean_ptr, d,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
    EVEN: tl.constexpr, CENTRED: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """X.c of a block of rows and one of codes [N, K]; in one CHUNK, the rows' are resident."""
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if CHUNKS == 1:
        c = load_channels(c_ptrs, c_channel, 0, d, BLOCK_D, EVEN)
        c = code_operands(c, mean_ptr, 0, d, BLOCK_D, CENTRED, SINGLE)
        return multiply(resident, c, sums)
    else:
        for chunk in tl.range(0, CHUNKS):
            first = chunk * BLOCK_D
            x = load_channels(x_ptrs, x_channel, first, d, BLOCK_D, EVEN)
            c = load_channels(c_ptrs, c_channel, first, d, BLOCK_D, EVEN)
            x = row_operands(x, mean_ptr, first, d, BLOCK_D, CENTRED, SINGLE)
            c = code_operands(c, mean_ptr, first, d, BLOCK_D, CENTRED, SINGLE)
            sums = multiply(x, c, sums)
        return sums


@inline
def row_bounds(
    x_ptrs, x_channel, mean_ptr, d, eps, shared, tiny,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
    EVEN: tl.constexpr, CENTRED: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """e and f of E, and whether rows are finite: [N]."""
    square = tl.zeros((BLOCK_N,), tl.float32)
    rounded = tl.zeros((BLOCK_N,), tl.float32)  # the square of what operands leave out
    broken = tl.zeros((BLOCK_N,), tl.int32)
    for chunk in tl.range(0, CHUNKS):
        first = chunk * BLOCK_D
        x = load_channels(x_ptrs, x_channel, first, d, BLOCK_D, EVEN)
        broken += tl.sum(tl.where(tl.abs(x.to(tl.float32)) < INFINITY, 0, 1), axis=1)
        exact = centred(x, mean_ptr, first, d, BLOCK_D, CENTRED)
        square += tl.sum(exact * exact, axis=1)
        if CENTRED and not SINGLE:
            rest = exact - exact.to(x.dtype).to(tl.float32)
            rounded += tl.sum(rest * rest, axis=1)
    norm = tl.sqrt(square) * SLACK + d * FLOOR
    norm = tl.where(norm <= LONGEST, norm, INFINITY)
    e = eps * norm + tl.sqrt(rounded) * SLACK + d * FLOOR
    return e, shared * norm * norm + tiny * (1 + norm), broken == 0
