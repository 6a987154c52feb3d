"""monarch_matmul on GPUs with Triton: what is launched."""

from torch import Tensor
from triton import cdiv

from kexue_kernels import dispatch
from kexue_kernels.monarch.plan import FUSED, FUSED_INTERPRETED, Shape, plan
from kexue_kernels.monarch.triton_monarch_fused_kernel import fused_kernel
from kexue_kernels.monarch.triton_monarch_products import (
    product,
    strides,
    weights_gradient,
    wide,
)
from kexue_kernels.triton_common import launching_on


def forward(x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None) -> Tensor:
    l, s, r = w2.shape
    y = x.new_empty(x.shape[0], s * l)
    bias = None if bias is None else bias.unflatten(0, (s, l)).mT
    if _fuses(x, w1, w2):
        blocks = x.unflatten(1, w1.shape[::2])
        _fused(blocks, w1.contiguous(), w2.contiguous(), bias, _by_second(y, s, l))
    else:
        product(_by_second(_hidden(x, w1), r, l), w2, bias, _by_second(y, s, l))
    return y


def backward(
    grad: Tensor, x: Tensor, w1: Tensor, w2: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    (k, q, p), (l, s, r) = w1.shape, w2.shape
    want_x, want_w1, want_w2 = wanted
    g = _by_second(grad, s, l)
    dx = grad.new_empty(grad.shape[0], k * p) if want_x else None
    dw1 = dw2 = None
    if want_w2:
        dw2 = weights_gradient(g, _by_second(_hidden(x, w1), r, l))
    if dx is not None and not want_w1 and _fuses(grad, w1, w2):
        u, v = w2.contiguous().transpose(1, 2), w1.contiguous().transpose(1, 2)
        _fused(g, u, v, None, dx.unflatten(1, (k, p)))
    elif want_x or want_w1:
        dz = grad.new_empty(grad.shape[0], k * q)
        product(g, w2.mT, None, _by_second(dz, r, l), conjugate=True)
        blocks = dz.unflatten(1, (k, q))
        if dx is not None:
            product(blocks, w1.mT, None, dx.unflatten(1, (k, p)), conjugate=True)
        dw1 = weights_gradient(blocks, x.unflatten(1, (k, p))) if want_w1 else None
    return dx, dw1, dw2


def _hidden(x: Tensor, w1: Tensor) -> Tensor:
    """What passes between the factors, z [N, k*q], in the data's dtype."""
    k, q, p = w1.shape
    z = x.new_empty(x.shape[0], k * q)
    product(x.unflatten(1, (k, p)), w1, None, z.unflatten(1, (k, q)))
    return z


def _by_second(x: Tensor, width: int, l: int) -> Tensor:
    """[N, width*l], l fastest, as [N, l, width]."""
    return x.unflatten(1, (width, l)).mT


def _fuses(x: Tensor, w1: Tensor, w2: Tensor) -> bool:
    """x: rows of the input, or of the gradient that arrives."""
    (k, q, p), (l, s, r) = w1.shape, w2.shape
    shape = Shape(x.shape[0], k, q, p, l, s, r, x.dtype)
    return x.stride(1) == 1 and x.stride(0) % 16 == 0 and plan(shape).path != "two"


def _fused(x: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """x [N, A, I], u [A, C, I], v [C, O, A], bias [C, O], y [N, C, O], the kernel's names."""
    (N, A, I), (C, O, _) = x.shape, v.shape
    tile = FUSED_INTERPRETED if dispatch.interpreting() else FUSED
    m, a, c, i, o = tile[:5]
    tiles = [(x, (m, a, i)), (u, (a, c, i)), (v, (c, o, a)), (y, (m, c, o))]
    with launching_on(x):
        fused_kernel[(cdiv(N, m) * cdiv(C, c),)](
            x,
            u,
            v,
            bias,
            y,
            N,
            C,
            *strides(x),
            *strides(u),
            *strides(v),
            *((0, 0) if bias is None else strides(bias)),
            *strides(y),
            A=A,
            I=I,
            O=O,
            STORE_C_LAST=y.stride(1) == 1,
            WIDE=wide(tiles),
            **tile._asdict(),
        )
