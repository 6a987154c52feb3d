"""What selective_scan's Triton kernels share: functions of a step, and numbers in memory.

A number is a tuple of float32 tensors, (x,) or (re, im), as in triton_common; complex64 in memory
is seen as pairs of float32, so pointers are always to reals.
"""

import triton.language as tl

from kexue_kernels.triton_common import inline

LOG2_E = tl.constexpr(1.4426950408889634)
_TWO_OVER_PI = tl.constexpr(0.6366197723675814)
# pi / 2 in three parts; the first two have few bits, so that whole multiples of them are exact
_QUARTER_1 = tl.constexpr(1.5703125)
_QUARTER_2 = tl.constexpr(0.0004837512969970703)
_QUARTER_3 = tl.constexpr(7.549789948768648e-08)


@inline
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -LOG2_E))


@inline
def softplus(x):
    """log(1 + e^x) = max(x, 0) + log(1 + e), e = exp(-|x|) <= 1; then log(1 + e) =
    2 artanh(e / (2 + e)) by its series, to the last bit."""
    e = tl.exp2(tl.abs(x) * -LOG2_E)
    s = e / (2.0 + e)
    s2 = s * s
    series = 1 / 13 + s2 * (1 / 15)
    for k in tl.static_range(6):
        series = 1 / (11 - 2 * k) + s2 * series
    return tl.maximum(x, 0.0) + 2.0 * s * series


@inline
def cos_sin(angle):
    """Of any angle: the device's own are only good near zero."""
    quarters = tl.floor(angle * _TWO_OVER_PI + 0.5)
    r = angle - quarters * _QUARTER_1
    r = r - quarters * _QUARTER_2
    r = r - quarters * _QUARTER_3
    r2 = r * r
    cos = 1 / 24 + r2 * (-1 / 720 + r2 * (1 / 40320 - r2 * (1 / 3628800)))
    cos = 1.0 + r2 * (-0.5 + r2 * cos)
    sin = -1 / 6 + r2 * (1 / 120 + r2 * (-1 / 5040 + r2 * (1 / 362880)))
    sin = r + r * r2 * sin
    quadrant = quarters - 4.0 * tl.floor(quarters * 0.25)
    odd = (quadrant == 1.0) | (quadrant == 3.0)
    c = tl.where(odd, sin, cos)
    s = tl.where(odd, cos, sin)
    c = tl.where((quadrant == 1.0) | (quadrant == 2.0), -c, c)
    return c, tl.where(quadrant >= 2.0, -s, s)


@inline
def scaled_for_exp2(A):
    """A with its real part times log2(e), once for all steps."""
    if len(A) == 2:
        return (A[0] * LOG2_E, A[1])
    else:
        return (A[0] * LOG2_E,)


@inline
def decay(dt, A2):
    """exp(dt A), of A as scaled_for_exp2 gives it."""
    size = tl.exp2(dt * A2[0])
    if len(A2) == 2:
        cos, sin = cos_sin(dt * A2[1])
        return (size * cos, size * sin)
    else:
        return (size,)


@inline
def scale(k, x):
    """A real k times a number."""
    if len(x) == 2:
        return (k * x[0], k * x[1])
    else:
        return (k * x[0],)


@inline
def scale_add(k, x, y):
    """A real k times x, plus y."""
    if len(x) == 2:
        return (k * x[0] + y[0], k * x[1] + y[1])
    else:
        return (k * x[0] + y[0],)


@inline
def real_of_product(x, y):
    """Re(x y)."""
    if len(x) == 2:
        return x[0] * y[0] - x[1] * y[1]
    else:
        return x[0] * y[0]


@inline
def load_number(ptr, offsets, mask, COMPLEX: tl.constexpr):
    """Elements of a real or complex tensor; zero where not `mask`."""
    if COMPLEX:
        re = tl.load(ptr + 2 * offsets, mask=mask, other=0.0)
        return (re, tl.load(ptr + 2 * offsets + 1, mask=mask, other=0.0))
    else:
        return (tl.load(ptr + offsets, mask=mask, other=0.0),)


@inline
def store_number(ptr, offsets, x, mask):
    if len(x) == 2:
        tl.store(ptr + 2 * offsets, x[0], mask=mask)
        tl.store(ptr + 2 * offsets + 1, x[1], mask=mask)
    else:
        tl.store(ptr + offsets, x[0], mask=mask)
