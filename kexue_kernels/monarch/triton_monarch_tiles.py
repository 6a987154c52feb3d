"""Tiles of numbers in Triton: loads, stores and products, of real and complex data alike.

A number is a tuple of tiles: (x,) or (re, im). Complex tensors come viewed as real ones: strides
count floats, and an imaginary part lies one float after its real part.
"""

import triton.language as tl

from kexue_kernels import dispatch
from kexue_kernels.triton_common import inline

_INTERPRETING = tl.constexpr(dispatch.interpreting())


@inline
def tiles_of(size, BLOCK: tl.constexpr):
    return (size + BLOCK - 1) // BLOCK


@inline
def index(size: tl.constexpr, WIDE: tl.constexpr):
    """0 .. size - 1, as what offsets in a tile are computed in."""
    return tl.arange(0, size).to(tl.int64 if WIDE else tl.int32)


@inline
def in_panels(tile, panel, PANEL: tl.constexpr, BLOCK_M: tl.constexpr):
    """Where a tile of rows begins, in panels of PANEL rows with rows fastest, `panel` apart."""
    each: tl.constexpr = PANEL // BLOCK_M
    return tl.cast(tile // each, tl.int64) * panel + tile % each * BLOCK_M


@inline
def load(ptrs, mask, COMPLEX: tl.constexpr):
    if COMPLEX:
        return (tl.load(ptrs, mask, 0.0), tl.load(ptrs + 1, mask, 0.0))
    else:
        return (tl.load(ptrs, mask, 0.0),)


@inline
def store(ptrs, x, mask):
    dtype: tl.constexpr = ptrs.dtype.element_ty
    tl.store(ptrs, x[0].to(dtype), mask)
    if len(x) == 2:
        tl.store(ptrs + 1, x[1].to(dtype), mask)


@inline
def zeros(shape: tl.constexpr, COMPLEX: tl.constexpr):
    if COMPLEX:
        return (tl.full(shape, 0.0, tl.float32), tl.full(shape, 0.0, tl.float32))
    else:
        return (tl.full(shape, 0.0, tl.float32),)


@inline
def cast(x, dtype: tl.constexpr):
    if len(x) == 2:
        return (x[0].to(dtype), x[1].to(dtype))
    else:
        return (x[0].to(dtype),)


@inline
def permute(x, order: tl.constexpr):
    if len(x) == 2:
        return (tl.permute(x[0], order), tl.permute(x[1], order))
    else:
        return (tl.permute(x[0], order),)


@inline
def conjugate_if(CONJUGATE: tl.constexpr, x):
    if CONJUGATE and len(x) == 2:
        return (x[0], -x[1])
    else:
        return x


@inline
def add_expanded(x, y, axis: tl.constexpr):
    """x + y, y having an axis of 1 inserted."""
    if len(x) == 2:
        return (x[0] + tl.expand_dims(y[0], axis), x[1] + tl.expand_dims(y[1], axis))
    else:
        return (x[0] + tl.expand_dims(y[0], axis),)


@inline
def multiply_add(x, y, acc, PRECISION: tl.constexpr):
    """acc + x y, matrix products of the last two axes."""
    if len(x) == 2:
        re = _dot(x[0], y[0], acc[0], PRECISION)
        im = _dot(x[0], y[1], acc[1], PRECISION)
        return (_dot(-x[1], y[1], re, PRECISION), _dot(x[1], y[0], im, PRECISION))
    else:
        return (_dot(x[0], y[0], acc[0], PRECISION),)


@inline
def _dot(x, y, acc, PRECISION: tl.constexpr):
    if _INTERPRETING:  # where bfloat16 products are wrong
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, acc, input_precision=PRECISION)
