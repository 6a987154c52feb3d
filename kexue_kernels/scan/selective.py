"""selective_scan, Mamba's S6, and the same in mamba-ssm's layout."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from kexue_kernels import autocast, checks, dispatch, launchers
from kexue_kernels.scan import reference, selective_operators
from kexue_kernels.scan.mamba_layout import channels_first

_STEPS = "[batch, L, d]"


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba's selective scan (S6), channels last:

        dt = delta + delta_bias, then softplus if asked
        x_t = exp(dt_t A) x_{t-1} + dt_t B_t u_t
        y_t = C_t x_t, summed over n (2 Re of it where A is complex)
        out = (y + D u) * silu(z)

    Args:
        u, delta, z: [batch, L, d], any strides (a transposed [batch, d, L] is not copied), in
            one dtype: float32, bfloat16 or float16 (float64 is served by the reference).
        A: [d, n], float32 or complex64 (float64, complex128).
        B, C: each [batch, L, n], or [batch, L, groups, n] where groups divides d and channel c
            is of group c // (d / groups), in `u`'s dtype; or time-invariant [d, n], in `u`'s
            or `A`'s dtype. complex64 where `A` is complex.
        D, delta_bias: [d], in `u`'s dtype or float32.
        delta_softplus: apply softplus to delta + delta_bias.
        initial_state: x before the first step, [batch, d, n], in `u`'s dtype or float32
            (complex64 where `A` is complex); zeros if None.
        return_final_state: also return the last state.
        cu_seqlens: int32 or int64 [N + 1], the boundaries of N sequences packed along L in a
            batch of 1: 0 first, L last, never descending (checked where that needs no copy
            from a GPU). States are then [N, d, n]; an empty sequence passes its own through.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        out [batch, L, d] in `u`'s dtype; with `return_final_state` also the final state
        [batch, d, n], float32 (complex64 where `A` is complex). Accumulation is in float32.

    Differentiable in every tensor but `cu_seqlens`, from both outputs, once (the reference:
    any number of times). Training keeps, beside the inputs, one state [d, n] for every 32 or
    n steps, whichever is more. Sums over channels and steps have a fixed order: the same inputs
    give bitwise the same results on the same device (on CPU also with the same number of
    threads). Under autocast the data arguments are promoted to one dtype.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a wrong shape, dtype, device or value, named.
        BackendUnavailableError: a forced backend that can't serve the call.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"
    (2023), algorithm 2; complex A as in Gu et al., "On the Parameterization and Initialization
    of Diagonal State Space Models" (2022), section 3.
    """
    _check_kinds(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    if autocast.enabled(u.device.type):
        u, delta, z, B, C = autocast.promoted(u, delta, z, B, C)
        D, delta_bias, initial_state = autocast.widened(D, delta_bias, initial_state)
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    checks.boolean("delta_softplus", delta_softplus)
    checks.boolean("return_final_state", return_final_state)
    backend = dispatch.resolve(backend)
    if launchers.served_by_reference("selective_scan", u, backend):
        return reference.selective_scan(
            u,
            delta,
            A,
            B,
            C,
            D,
            z,
            delta_bias,
            delta_softplus,
            initial_state=initial_state,
            return_final_state=return_final_state,
            cu_seqlens=cu_seqlens,
        )
    n = A.shape[1]
    if n == 0:  # as one state that stays 0
        A, B, C = (F.pad(x, (0, 1)) for x in (A, B, C))
        initial_state = None if initial_state is None else F.pad(initial_state, (0, 1))
    inputs = u, delta, A, B, C, D, z, delta_bias, initial_state
    keep_states = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    out, final_state, _ = selective_operators.selective_scan(
        *inputs, cu_seqlens, delta_softplus, return_final_state, keep_states, backend
    )
    return (out, final_state[..., :n]) if return_final_state else out


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan` in mamba-ssm's layout and by its name.

    Args:
        u, delta, z: [batch, d, L].
        A: [d, n], float32 or complex64.
        B, C: each [d, n], [batch, n, L] or [batch, groups, n, L]; where `A` is complex and they
            vary over time, real, with real and imaginary parts interleaved: [.., n, 2 L].
        D, delta_bias: [d].
        delta_softplus: apply softplus to delta + delta_bias.
        return_last_state: also return the last state [batch, d, n].
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        out [batch, d, L], a view of channels-last memory, or (out, last state). Unlike
        mamba-ssm's, the last state carries gradients.

    Dtypes, errors and the rest are `selective_scan`'s, which has more options.
    """
    scan = functools.partial(selective_scan, backend=backend)
    return channels_first(scan)(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state
    )


def _check_kinds(**inputs: object) -> None:
    optional = ("D", "z", "delta_bias")
    for name, value in inputs.items():
        if value is not None or name not in optional:
            checks.tensor(name, value)


def _check(
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
) -> None:
    checks.dtype("u", u, checks.REAL)
    checks.ndim("u", u, 3, _STEPS)
    checks.like("delta", delta, u, "u", _STEPS)
    if z is not None:
        checks.like("z", z, u, "u", _STEPS)
    d = u.shape[2]
    real, complex_ = checks.state_dtype(u.dtype), checks.complex_dtype(u.dtype)
    checks.dtype("A", A, (real, complex_))
    checks.ndim("A", A, 2, "[d, n]")
    checks.shape("A", A, (d, A.shape[1]), "[d, n]")
    checks.device("A", A, u.device, "u")
    _check_matrix("B", B, u, A)
    _check_matrix("C", C, u, A)
    for name, value in (("D", D), ("delta_bias", delta_bias)):
        if value is not None:
            checks.dtype(name, value, {u.dtype, real})
            checks.shape(name, value, (d,), "[d]")
            checks.device(name, value, u.device, "u")
    if cu_seqlens is not None:
        checks.cu_seqlens(cu_seqlens, u, "u")
    if initial_state is not None:
        _check_initial_state(initial_state, u, A, cu_seqlens)


def _check_matrix(name: str, matrix: Tensor, u: Tensor, A: Tensor) -> None:
    """B or C: per step, per step and group, or time-invariant."""
    batch, L, d = u.shape
    n = A.shape[1]
    own = A.dtype if A.is_complex() else u.dtype
    checks.dtype(name, matrix, {own, A.dtype} if matrix.ndim == 2 else {own})
    checks.device(name, matrix, u.device, "u")
    if matrix.ndim == 2:
        checks.shape(name, matrix, (d, n), "[d, n]")
    elif matrix.ndim == 3:
        checks.shape(name, matrix, (batch, L, n), "[batch, L, n]")
    elif matrix.ndim == 4:
        groups = matrix.shape[2]
        checks.shape(name, matrix, (batch, L, groups, n), "[batch, L, groups, n]")
        if groups == 0 or d % groups:
            raise ValueError(
                f"{name}: expected a number of groups that divides d = {d}, got {groups}"
            )
    else:
        raise ValueError(
            f"{name}: expected shape [batch, L, n], [batch, L, groups, n] or [d, n], "
            f"got {list(matrix.shape)}"
        )


def _check_initial_state(
    initial_state: Tensor, u: Tensor, A: Tensor, cu_seqlens: Tensor | None
) -> None:
    rows = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    axes = "[batch, d, n]" if cu_seqlens is None else "[N, d, n]"
    checks.tensor("initial_state", initial_state)
    own = {A.dtype} if A.is_complex() else {u.dtype, A.dtype}
    checks.dtype("initial_state", initial_state, own)
    checks.shape("initial_state", initial_state, (rows, *A.shape), axes)
    checks.device("initial_state", initial_state, u.device, "u")
