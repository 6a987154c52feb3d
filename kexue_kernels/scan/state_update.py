"""selective_state_update: one step of the selective scan, for generation."""

from typing import Any

from torch import Tensor

from kexue_kernels import checks, dispatch
from kexue_kernels.scan import reference, selective_operators

_NAMES = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """One step of the selective scan, `state` updated in place, as mamba-ssm's function.

        dt = dt + dt_bias, then softplus if asked
        state = exp(dt A) state + dt B x
        out = (C state + D x) * silu(z)

    Args:
        state: [batch, d, n], or with heads [batch, H, P, n]; float32, bfloat16 or float16 (or
            float64, served by the reference), any strides.
        x, dt, z: [batch, d], or [batch, H, P].
        A: [d, n], or [H, P, n]; strides of 0 (one number for a head) are read as such.
        B, C: [batch, n] or [batch, 1, n], or with heads [batch, groups, n] where groups
            divides H and head h is of group h // (H / groups).
        D, dt_bias: [d], or [H, P].
        dt_softplus: apply softplus to dt + dt_bias.
        state_batch_indices: int32 or int64 [batch]: row i has state[state_batch_indices[i]],
            and `state` has any number of rows. No index but a negative one may occur twice. A
            negative one gives zeros and updates nothing. One past the last state raises
            on CPU; on GPUs it is treated as a negative one.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        out, of x's shape and dtype. Arithmetic is in float32; inputs of several dtypes are
        promoted, as in mamba-ssm.

    For inference: an input that requires grad, in grad mode, raises.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a wrong shape, dtype, device or value, named.
        BackendUnavailableError: a forced backend that can't serve the call.
        RuntimeError: an input requires grad.

    Source: Gu and Dao, "Mamba" (2023), section 3.3; heads as in Dao and Gu, "Transformers are
    SSMs" (2024), section 7.
    """
    inputs = state, x, dt, A, B, C, D, z, dt_bias
    _check_kinds(*inputs)
    _check_shapes(*inputs)
    checks.written("state", state)
    checks.boolean("dt_softplus", dt_softplus)
    _check_indices(state_batch_indices, state, x)
    if checks.recorded(*inputs):
        raise RuntimeError(
            "selective_state_update is for inference, but an input requires grad: call it under "
            "torch.no_grad(), or detach its inputs"
        )
    backend = dispatch.resolve(backend)
    if _served_by_reference(state, x, backend):
        if state_batch_indices is not None:
            selective_operators.check_in_range(state_batch_indices, state)
        return reference.selective_state_update(*inputs, dt_softplus, state_batch_indices)
    out = selective_operators.selective_state_update(
        *_in_one_dtype(*_with_heads(*inputs)), dt_softplus, state_batch_indices, backend
    )
    return (out if x.ndim == 3 else out.squeeze(1)).to(x.dtype)


def _served_by_reference(state: Tensor, x: Tensor, backend: str) -> bool:
    is_wide = x.dtype in checks.DOUBLE or state.dtype in checks.DOUBLE
    return backend == "reference" or (backend == "auto" and is_wide and not x.is_meta)


def _with_heads(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
) -> tuple[Any, ...]:
    """The same with one head where there were none, and one group."""
    B = B if B.ndim == 3 else B.unsqueeze(1)
    C = C if C.ndim == 3 else C.unsqueeze(1)
    if x.ndim == 3:
        return state, x, dt, A, B, C, D, z, dt_bias
    state, x, dt, A = state.unsqueeze(1), x.unsqueeze(1), dt.unsqueeze(1), A.unsqueeze(0)
    D, dt_bias = (None if m is None else m.unsqueeze(0) for m in (D, dt_bias))
    return state, x, dt, A, B, C, D, None if z is None else z.unsqueeze(1), dt_bias


def _in_one_dtype(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
) -> tuple[Any, ...]:
    """Data of several dtypes as float32, parameters always so."""
    if not x.dtype == dt.dtype == B.dtype == C.dtype == (x if z is None else z).dtype:
        x, dt, B, C = x.float(), dt.float(), B.float(), C.float()
        z = None if z is None else z.float()
    D, dt_bias = (None if m is None else m.float() for m in (D, dt_bias))
    return state, x, dt, A.float(), B, C, D, z, dt_bias


def _check_kinds(*inputs: Tensor | None) -> None:
    given = dict(zip(_NAMES, inputs, strict=True))
    for name, value in given.items():
        if value is not None or name not in ("D", "z", "dt_bias"):
            checks.tensor(name, value)
    for name, value in given.items():
        if value is not None:
            checks.dtype(name, value, checks.REAL)
            checks.device(name, value, given["x"].device, "x")  # type: ignore[union-attr]


def _check_shapes(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
) -> None:
    if x.ndim not in (2, 3):
        raise ValueError(f"x: expected shape [batch, d] or [batch, H, P], got {list(x.shape)}")
    own = "d" if x.ndim == 2 else "H, P"
    batch, inner = x.shape[0], tuple(x.shape[1:])
    checks.shape("dt", dt, (batch, *inner), f"[batch, {own}]")
    if z is not None:
        checks.shape("z", z, (batch, *inner), f"[batch, {own}]")
    for name, value in (("D", D), ("dt_bias", dt_bias)):
        if value is not None:
            checks.shape(name, value, inner, f"[{own}]")
    checks.ndim("A", A, x.ndim, f"[{own}, n]")
    checks.shape("A", A, (*inner, A.shape[-1]), f"[{own}, n]")
    checks.ndim("state", state, x.ndim + 1, f"[batch, {own}, n]")
    checks.shape("state", state, (state.shape[0], *A.shape), f"[batch, {own}, n]")
    _check_matrix("B", B, x, A)
    _check_matrix("C", C, x, A)


def _check_matrix(name: str, matrix: Tensor, x: Tensor, A: Tensor) -> None:
    batch, n = x.shape[0], A.shape[-1]
    heads = 1 if x.ndim == 2 else x.shape[1]
    if matrix.ndim == 2:
        return checks.shape(name, matrix, (batch, n), "[batch, n]")
    checks.ndim(name, matrix, 3, "[batch, n] or [batch, groups, n]")
    groups = matrix.shape[1]
    checks.shape(name, matrix, (batch, groups, n), "[batch, groups, n]")
    if groups == 0 or heads % groups:
        raise ValueError(
            f"{name}: expected a number of groups that divides H = {heads}, got {groups}"
        )
    return None


def _check_indices(indices: Tensor | None, state: Tensor, x: Tensor) -> None:
    if indices is None:
        own = "d" if x.ndim == 2 else "H, P"
        checks.shape("state", state, (x.shape[0], *state.shape[1:]), f"[batch, {own}, n]")
        return
    checks.tensor("state_batch_indices", indices)
    checks.dtype("state_batch_indices", indices, checks.INDEX)
    checks.shape("state_batch_indices", indices, (x.shape[0],), "[batch]")
    checks.device("state_batch_indices", indices, x.device, "x")
