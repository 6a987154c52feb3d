"""The registered operators of selective_scan and of its one-step form.

A launcher module `<backend>_selective_scan` fills what is allocated here (`forward`) and makes
the gradients (`backward`); it is given non-empty plain tensors: B and C either [batch, L,
groups, n] or time-invariant [d, n]; A, invariant B and C, states and checkpoints contiguous, in
float32 or complex64; D and delta_bias in float32, cu_seqlens in int64, contiguous.
`checkpoints` [batch, chunks, n, d] are the states that enter steps k * chunk_length(n): with
them the backward recomputes all others, chunk by chunk.
"""

from typing import Any

import torch
from torch import Tensor

from kexue_kernels import registry
from kexue_kernels.checks import state_dtype
from kexue_kernels.launchers import launcher_of
from kexue_kernels.scan import reference
from kexue_kernels.scan.chunks import SelectiveInputs, chunk_length
from kexue_kernels.scan.operators import as_state, bounds, plain, sequences


def _outputs(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    return_final_state: bool,
    keep_states: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, final_state and checkpoints; the latter two have no rows unless asked for."""
    batch, L, d = u.shape
    n = A.shape[1]
    rows = sequences(u, cu_seqlens) if return_final_state else 0
    length = chunk_length(n)
    return (
        u.new_empty(u.shape),
        A.new_empty((rows, d, n), dtype=state_dtype(A.dtype)),
        A.new_empty(
            (batch if keep_states else 0, (L + length - 1) // length, n, d),
            dtype=state_dtype(A.dtype),
        ),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, delta_softplus, _, keep_states, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2] if keep_states else None)
    ctx.delta_softplus, ctx.backend = delta_softplus, backend


def _grad(
    ctx: Any, grad_out: Tensor | None, grad_final: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    *tensors, checkpoints = ctx.saved_tensors
    u, cu_seqlens = tensors[0], tensors[9]
    if grad_out is None and grad_final is None:
        return (None,) * 14
    if grad_out is None:
        grad_out = u.new_zeros(()).expand(u.shape)
    if grad_final is not None and grad_final.shape[0] == 0 < sequences(u, cu_seqlens):
        grad_final = None  # of a final state that was not asked for
    if checkpoints is None:
        options = ctx.delta_softplus, False, True, ctx.backend
        checkpoints = selective_scan(*tensors, *options)[2]
    grads = selective_scan_backward(
        grad_out, grad_final, *tensors, checkpoints, ctx.delta_softplus, ctx.backend
    )
    given = tensors[:9]
    return (
        *(
            g.to(x.dtype) if x is not None and needed else None
            for g, x, needed in zip(grads, given, ctx.needs_input_grad[:9], strict=True)
        ),
        *(None,) * 5,
    )


@registry.operator(
    "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, Tensor? initial_state, Tensor? cu_seqlens, bool delta_softplus, "
    "bool return_final_state, bool keep_states, str backend) "
    "-> (Tensor out, Tensor final_state, Tensor checkpoints)",
    fake=_outputs,
    setup_context=_setup,
    backward=_grad,
)
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    return_final_state: bool,
    keep_states: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [batch, L, d]; the last state, and states for the backward, where asked for."""
    inputs = _normal(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus)
    out, final_state, checkpoints = _outputs(*inputs, return_final_state, keep_states, backend)
    launcher = launcher_of("scan", "selective_scan", backend, u)
    if u.numel() == 0:  # no step is taken
        first = inputs.initial_state
        if return_final_state:
            final_state = final_state.zero_() if first is None else first.clone()
        return out, final_state, checkpoints
    launcher.forward(
        inputs,
        out,
        final_state if return_final_state else None,
        checkpoints if keep_states else None,
    )
    return out, final_state, checkpoints


def _normal(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
) -> SelectiveInputs:
    """The inputs as launchers want them."""
    state = state_dtype(A.dtype)
    return SelectiveInputs(
        plain(u),
        plain(delta),
        _contiguous(A, state),
        _matrix(B, state),
        _matrix(C, state),
        None if D is None else _contiguous(D, torch.float32),
        None if z is None else plain(z),
        None if delta_bias is None else _contiguous(delta_bias, torch.float32),
        as_state(initial_state, state),
        bounds(cu_seqlens, u.shape[1]),
        delta_softplus,
    )


def _contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    return plain(x.to(dtype)).contiguous()


def _matrix(x: Tensor, state: torch.dtype) -> Tensor:
    """B or C: per step with groups, or time-invariant."""
    if x.ndim == 2:
        return _contiguous(x, state)
    return plain(x) if x.ndim == 4 else plain(x).unsqueeze(2)


def _gradients(grad_out: Tensor, grad_final: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """One for each of u to initial_state, in its own dtype; empty where there is no such input."""
    inputs = rest[:9]
    empty = grad_out.new_empty(0)
    return tuple(empty.clone() if x is None else x.new_empty(x.shape) for x in inputs)


@registry.operator(
    "selective_scan_backward(Tensor grad_out, Tensor? grad_final, Tensor u, Tensor delta, "
    "Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "Tensor? initial_state, Tensor? cu_seqlens, Tensor checkpoints, bool delta_softplus, "
    "str backend) -> (Tensor grad_u, Tensor grad_delta, Tensor grad_A, Tensor grad_B, "
    "Tensor grad_C, Tensor grad_D, Tensor grad_z, Tensor grad_delta_bias, Tensor grad_initial)",
    fake=_gradients,
    setup_context=registry.keep_nothing,
    backward=registry.refuse_gradient("the gradient of selective_scan"),
)
def selective_scan_backward(
    grad_out: Tensor,
    grad_final: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    delta_softplus: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    """The gradients of u to initial_state, each in its input's shape and dtype."""
    given = u, delta, A, B, C, D, z, delta_bias, initial_state
    inputs = _normal(*given, cu_seqlens, delta_softplus)
    grad_final = as_state(grad_final, state_dtype(A.dtype))
    launcher = launcher_of("scan", "selective_scan", backend, u)
    if u.numel() == 0:  # the initial state went straight to the final one
        *grads, grad_initial = (torch.zeros_like(u if x is None else x) for x in given)
        if initial_state is not None and grad_final is not None:
            grad_initial = grad_final.to(initial_state.dtype, copy=True)
        return *grads, grad_initial
    grads = launcher.backward(
        plain(grad_out),
        grad_final,
        inputs,
        checkpoints.contiguous(),
    )
    return tuple(
        u.new_empty(0) if x is None else g.to(x.dtype).reshape(x.shape).contiguous()
        for g, x in zip(grads, given, strict=True)
    )


# ---- one step


def _out(state: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@registry.operator(
    "selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
    "Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, Tensor? state_batch_indices, "
    "str backend) -> Tensor",
    fake=_out,
    vmap=registry.refuse_vmap("selective_state_update updates its state in place"),
)
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state_batch_indices: Tensor | None,
    backend: str,
) -> Tensor:
    """y, of x's shape [batch, H, P]; state [S, H, P, n] becomes the next one."""
    if state_batch_indices is not None:
        check_in_range(state_batch_indices, state)
        state_batch_indices = state_batch_indices.to(torch.int64).contiguous()
    launcher = launcher_of("scan", "selective_state_update", backend, x)
    if x.numel() == 0 or state.numel() == 0:
        return reference.selective_state_update(
            state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices
        )
    own = plain(state)
    inputs = (None if m is None else plain(m) for m in (x, dt, A, B, C, D, z, dt_bias))
    out = x.new_empty(x.shape)
    launcher.update(own, *inputs, dt_softplus, state_batch_indices, out)
    if own is not state:
        state.copy_(own)
    torch.autograd.graph.increment_version(state)
    return out


def check_in_range(indices: Tensor, state: Tensor) -> None:
    """Where reading the values costs no synchronisation."""
    if indices.device.type == "cpu" and indices.numel():
        largest = int(indices.max())
        if largest >= state.shape[0]:
            raise ValueError(
                f"state_batch_indices: expected indices below {state.shape[0]} (state's first "
                f"axis), got {largest}"
            )
