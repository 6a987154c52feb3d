"""monarch_matmul on GPUs with Triton: what is launched."""

from torch import Tensor
from triton import cdiv

from kexue_kernels import dispatch
from kexue_kernels.monarch.plan import (
    FUSED,
    FUSED_INTERPRETED,
    RESIDENT_FUSED,
    Plan,
    Shape,
    plan,
    resident_programs,
)
from kexue_kernels.monarch.triton_monarch_fused_kernel import fused_kernel, resident_fused_kernel
from kexue_kernels.monarch.triton_monarch_products import (
    from_panels,
    gradients,
    panels,
    product,
    shared_memory,
    strides,
    weights_gradient,
    wide,
)
from kexue_kernels.triton_common import launching_on, multiprocessors


def forward(x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None) -> Tensor:
    (k, _, p), (l, s, r) = w1.shape, w2.shape
    out = x.new_empty(x.shape[0], s * l)
    bias = None if bias is None else bias.unflatten(0, (s, l)).mT
    blocks, y = x.unflatten(1, (k, p)), _by_second(out, s, l)
    chosen = _plan(x, w1, w2, shared_memory(x.device))
    if chosen.path != "two":
        fused = _resident_fused if chosen.resident else _fused
        fused(blocks, w1.contiguous(), w2.contiguous(), bias, y)
    elif chosen.resident:
        z = panels(blocks, w1).flatten(1, 2).unflatten(1, (r, l)).transpose(1, 2)
        from_panels(z, w2, bias, y)
    else:
        product(_by_second(_hidden(x, w1), r, l), w2, bias, y)
    return out


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
    if dx is not None and not want_w1 and _plan(grad, w1, w2).path != "two":
        u, v = w2.contiguous().transpose(1, 2), w1.contiguous().transpose(1, 2)
        _fused(g, u, v, None, dx.unflatten(1, (k, p)))
    elif want_x or want_w1:
        dz = grad.new_empty(grad.shape[0], k * q)
        product(g, w2.mT, None, _by_second(dz, r, l), conjugate=True)
        blocks = dz.unflatten(1, (k, q))
        rows = x.unflatten(1, (k, p))
        if dx is None:
            dw1 = weights_gradient(blocks, rows)
        elif want_w1:
            dw1 = gradients(blocks, w1, rows, dx.unflatten(1, (k, p)))
        else:
            product(blocks, w1.mT, None, dx.unflatten(1, (k, p)), conjugate=True)
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


def _plan(x: Tensor, w1: Tensor, w2: Tensor, shared: int = 0) -> Plan:
    """x: rows of the input, or of the gradient that arrives."""
    (k, q, p), (l, s, r) = w1.shape, w2.shape
    vectors = x.stride(1) == 1 and x.stride(0) % 16 == 0
    return plan(Shape(x.shape[0], k, q, p, l, s, r, x.dtype), shared, vectors)


def _resident_fused(x: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """As `_fused`, blocks adjacent in y."""
    (N, A, I), (C, O, _) = x.shape, v.shape
    m, a, c, i, o = RESIDENT_FUSED[:5]
    tiles = [(x, (m, a, i)), (u, (a, c, i)), (v, (c, o, a)), (y, (m, c, o))]
    groups = cdiv(C, c)
    programs = groups * resident_programs(groups, cdiv(N, m), multiprocessors(x.device))
    with launching_on(x):
        resident_fused_kernel[(programs,)](
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
            WIDE=wide(tiles),
            **RESIDENT_FUSED._asdict(),
        )


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
