"""The registered operators of the scan family, their gradients and batching rules.

With h_t = a_t h_{t-1} + b_t and g_t the gradient of h_t (g_F that of the final state), the
gradient of b is itself a scan, run the other way with a shifted by one step:

    db_t = g_t + conj(a_{t+1}) db_{t+1},    db_L = g_L + g_F
    da_t = db_t conj(h_{t-1}),              dh_0 = conj(a_1) db_1

A launcher module `<backend>_linear_scan` offers `forward` and `backward` with the meaning of
the two operators below; it is given non-empty plain tensors: `a` [1 or B, 1 or L, 1 or D],
states contiguous in the state's dtype, cu_seqlens int64 and contiguous.
"""

from typing import Any

import torch
from torch import Tensor

from kexue_kernels import registry
from kexue_kernels.checks import cu_seqlens_values, state_dtype
from kexue_kernels.launchers import launcher_of
from kexue_kernels.scan.batching import fold_of, logical_shape
from kexue_kernels.scan.shift import previous, previous_adjoint


def plain(x: Tensor) -> Tensor:
    """Without lazy conjugation or negation, which a pointer does not show."""
    return x.resolve_conj().resolve_neg() if x.is_conj() or x.is_neg() else x


def _three(a: Tensor) -> Tensor:
    """A view with leading ones: [1 or B, 1 or L, 1 or D]."""
    return a if a.ndim == 3 else a.view(*(1,) * (3 - a.ndim), *a.shape)


def as_state(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else plain(x.to(state_dtype(dtype))).contiguous()


def bounds(cu_seqlens: Tensor | None, length: int) -> Tensor | None:
    """cu_seqlens as int64, its values checked where reading them costs no synchronisation."""
    if cu_seqlens is None:
        return None
    if cu_seqlens.device.type == "cpu":
        cu_seqlens_values(cu_seqlens, length)
    return cu_seqlens.to(torch.int64).contiguous()


def sequences(b: Tensor, cu_seqlens: Tensor | None) -> int:
    return b.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _forward_fake(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    return_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    h = b.new_empty(b.shape)
    if not return_final_state:
        return h, registry.nothing(a)
    return h, b.new_empty((sequences(b, cu_seqlens), b.shape[2]), dtype=state_dtype(b.dtype))


def _backward_fake(
    a: Tensor,
    h: Tensor | None,
    initial_state: Tensor | None,
    grad_h: Tensor,
    grad_final: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_a = registry.nothing(a) if h is None else a.new_empty(a.shape)
    grad_b = grad_h.new_empty(grad_h.shape)
    if initial_state is None:
        return grad_a, grad_b, registry.nothing(a)
    states = sequences(grad_h, cu_seqlens), grad_h.shape[2]
    return grad_a, grad_b, grad_h.new_empty(states, dtype=state_dtype(grad_h.dtype))


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, b, initial_state, cu_seqlens, reverse, return_final_state, backend = inputs
    ctx.set_materialize_grads(False)
    h = output[0] if ctx.needs_input_grad[0] else None
    ctx.save_for_backward(a, h, initial_state, cu_seqlens)
    ctx.b_shape, ctx.b_dtype, ctx.b_device = b.shape, b.dtype, b.device
    ctx.reverse, ctx.return_final_state, ctx.backend = reverse, return_final_state, backend


def _grad_forward(ctx: Any, grad_h: Tensor | None, grad_final: Tensor | None) -> tuple[Any, ...]:
    a, h, initial_state, cu_seqlens = ctx.saved_tensors
    if not ctx.return_final_state:
        grad_final = None
    if grad_h is None and grad_final is None:
        return (None,) * 7
    if grad_h is None:
        grad_h = torch.zeros((), dtype=ctx.b_dtype, device=ctx.b_device).expand(ctx.b_shape)
    grad_a, grad_b, grad_initial = linear_scan_backward(
        a, h, initial_state, grad_h, grad_final, cu_seqlens, ctx.reverse, ctx.backend
    )
    needs_a, needs_b, needs_initial, *_ = ctx.needs_input_grad
    return (
        grad_a if needs_a else None,
        grad_b if needs_b else None,
        grad_initial.to(initial_state.dtype) if needs_initial else None,
        *(None,) * 4,
    )


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, h, initial_state, _, _, cu_seqlens, reverse, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a, h, initial_state, output[1], cu_seqlens)
    ctx.reverse, ctx.backend = reverse, backend


def _grad_backward(
    ctx: Any, v: Tensor | None, u: Tensor | None, w: Tensor | None
) -> tuple[Any, ...]:
    """The second derivative: a scan in the forward direction, so differentiable again.

    With v, u, w the gradients of da, db, dh_0:

        mu_t = a_t mu_{t-1} + u_t + v_t h_{t-1},  mu_0 = w
        dg_t = mu_t,  dg_F = mu_L,  da_t = conj(mu_{t-1}) db_t,  dh_{t-1} = conj(v_t) db_t
    """
    a, h, initial_state, grad_b, cu_seqlens = ctx.saved_tensors
    needs_a, needs_h, needs_initial, needs_grad_h, needs_grad_final, *_ = ctx.needs_input_grad
    v = None if h is None else v
    w = None if initial_state is None else w
    if u is None and v is None and w is None:
        return (None,) * 8
    source = torch.zeros_like(grad_b) if u is None else u
    if v is not None:
        source = source + v * previous(h, initial_state, cu_seqlens, ctx.reverse)
    mu, mu_final = linear_scan(a, source, w, cu_seqlens, ctx.reverse, True, ctx.backend)
    grad_a = grad_h = grad_initial = None
    if needs_a:
        grad_a = previous(mu, w, cu_seqlens, ctx.reverse).conj() * grad_b
        grad_a = grad_a.sum_to_size(a.shape)
    if v is not None and (needs_h or needs_initial):
        grad_h, grad_initial = previous_adjoint(v.conj() * grad_b, cu_seqlens, ctx.reverse)
        grad_h = grad_h if needs_h else None
        grad_initial = grad_initial.to(initial_state.dtype) if needs_initial else None
    return (
        grad_a,
        grad_h,
        grad_initial,
        mu if needs_grad_h else None,
        mu_final if needs_grad_final else None,
        *(None,) * 3,
    )


def _forward_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    if info.batch_size == 0:
        return registry.one_by_one(linear_scan.overload)(info, in_dims, *args)
    a, b, initial_state, cu_seqlens, *options = args
    fold = fold_of(info.batch_size, cu_seqlens, in_dims[3])
    B, _, D = logical_shape(b, in_dims[1])
    h, final_state = linear_scan.overload(
        fold.decay(a, in_dims[0], B, D),
        fold.data(b, in_dims[1]),
        fold.data(initial_state, in_dims[2]),
        cu_seqlens,
        *options,
    )
    return (fold.undo(h), fold.undo(final_state)), (0, 0)


def _backward_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    if info.batch_size == 0:
        return registry.one_by_one(linear_scan_backward.overload)(info, in_dims, *args)
    a, *data, cu_seqlens, reverse, backend = args
    fold = fold_of(info.batch_size, cu_seqlens, in_dims[5])
    B, _, D = logical_shape(data[2], in_dims[3])
    grad_a, grad_b, grad_initial = linear_scan_backward.overload(
        fold.decay(a, in_dims[0], B, D),
        *(fold.data(x, dim) for x, dim in zip(data, in_dims[1:5], strict=True)),
        cu_seqlens,
        reverse,
        backend,
    )
    grads = fold.undo(grad_b), fold.undo(grad_initial)
    if data[0] is None:
        return (grad_a, *grads), (None, 0, 0)
    return (fold.undo_decay(grad_a, logical_shape(a, in_dims[0])), *grads), (0, 0, 0)


@registry.operator(
    "linear_scan(Tensor a, Tensor b, Tensor? initial_state, Tensor? cu_seqlens, bool reverse, "
    "bool return_final_state, str backend) -> (Tensor h, Tensor final_state)",
    fake=_forward_fake,
    setup_context=_setup_forward,
    backward=_grad_forward,
    vmap=_forward_vmap,
)
def linear_scan(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    return_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """h [B, L, D] and, where asked for, the final state."""
    a, b = _three(plain(a)), plain(b)
    initial_state = as_state(initial_state, b.dtype)
    cu_seqlens = bounds(cu_seqlens, b.shape[1])
    launcher = launcher_of("scan", "linear_scan", backend, b)
    if b.numel() == 0:
        h, final_state = _forward_fake(
            a, b, initial_state, cu_seqlens, reverse, return_final_state, backend
        )
        if not return_final_state:
            return h, None
        return h, final_state.zero_() if initial_state is None else initial_state.clone()
    return launcher.forward(a, b, initial_state, cu_seqlens, reverse, return_final_state)


@registry.operator(
    "linear_scan_backward(Tensor a, Tensor? h, Tensor? initial_state, Tensor grad_h, "
    "Tensor? grad_final, Tensor? cu_seqlens, bool reverse, str backend) "
    "-> (Tensor grad_a, Tensor grad_b, Tensor grad_initial)",
    fake=_backward_fake,
    setup_context=_setup_backward,
    backward=_grad_backward,
    vmap=_backward_vmap,
)
def linear_scan_backward(
    a: Tensor,
    h: Tensor | None,
    initial_state: Tensor | None,
    grad_h: Tensor,
    grad_final: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Gradients in `a`'s shape (None without `h`), in b's, and in the state's dtype (None
    without an initial state). `reverse` is the forward's."""
    shape = a.shape
    a, grad_h = _three(plain(a)), plain(grad_h)
    h = None if h is None else plain(h)
    initial_state = as_state(initial_state, grad_h.dtype)
    grad_final = as_state(grad_final, grad_h.dtype)
    cu_seqlens = bounds(cu_seqlens, grad_h.shape[1])
    launcher = launcher_of("scan", "linear_scan", backend, grad_h)
    if grad_h.numel() == 0:
        grad_a = None if h is None else a.new_zeros(shape)
        grad_initial = None  # no step was taken: the initial state went straight to the final one
        if initial_state is not None:
            passed = torch.zeros_like(initial_state) if grad_final is None else grad_final
            grad_initial = passed.clone()
        return grad_a, torch.empty_like(grad_h), grad_initial
    grad_a, grad_b, grad_initial = launcher.backward(
        a, h, initial_state, grad_h, grad_final, cu_seqlens, reverse
    )
    if grad_a is not None:  # [B, L, D], or partial sums [B, any, D] where a is time-invariant
        grad_a = grad_a.sum_to_size(a.shape).to(a.dtype).view(shape)
    return grad_a, grad_b, grad_initial
