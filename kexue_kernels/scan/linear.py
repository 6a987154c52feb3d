"""linear_scan: h_t = a_t h_{t-1} + b_t."""

from torch import Tensor

from kexue_kernels import autocast, checks, dispatch
from kexue_kernels.launchers import served_by_reference
from kexue_kernels.scan import operators, reference


def linear_scan(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The first-order linear recurrence h_t = a_t * h_{t-1} + b_t, elementwise along L.

    Args:
        a: decay, of `b`'s dtype; [B, L, D], or time-invariant [D] or [1, 1, D] (never
            expanded in memory), or any other shape that broadcasts to `b`.
        b: input [B, L, D]; float32, bfloat16, float16 or complex64 (float64 and complex128
            are served by the reference).
        initial_state: h before the first step, [B, D], in `b`'s dtype or the state's
            (float32 for halves, else `b`'s own); zeros if None.
        reverse: run from the end, h_t = a_t * h_{t+1} + b_t; the initial state then enters
            at the end and the final state is the first step's.
        cu_seqlens: int32 or int64 [N + 1], the boundaries of N sequences packed along L in
            a batch of 1: 0 first, L last, never descending (checked where that needs no
            copy from a GPU). States are then [N, D]; an empty sequence passes its initial
            state through.
        return_final_state: also return the last state.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        h [B, L, D] in `b`'s dtype, contiguous; with `return_final_state` also the final
        state [B, D] in the state's dtype. Accumulation is float32 (complex64) or better.

    Differentiable in `a`, `b` and `initial_state`, from both outputs, any number of times.
    The same inputs give bitwise the same results on the same device (on CPU also with the
    same number of threads). Under autocast, `a` and `b` of different dtypes are promoted
    and a half-precision state is taken as float32.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a wrong shape, dtype, device or value, named.
        BackendUnavailableError: a forced backend that can't serve the call.

    Source: Blelloch, "Prefix Sums and Their Applications" (1990), section 1.4; as a layer,
    Martin and Cundy, "Parallelizing Linear Recurrent Neural Nets Over Sequence Length" (2018).
    """
    checks.tensor("a", a)
    checks.tensor("b", b)
    if (a.dtype != b.dtype or initial_state is not None) and autocast.enabled(b.device.type):
        a, b = autocast.promoted(a, b)
        (initial_state,) = autocast.widened(initial_state)
    _check_linear_scan(a, b, initial_state, reverse, cu_seqlens, return_final_state)
    backend = dispatch.resolve(backend)
    if served_by_reference("linear_scan", b, backend):
        return reference.linear_scan(
            a,
            b,
            initial_state,
            reverse=reverse,
            cu_seqlens=cu_seqlens,
            return_final_state=return_final_state,
        )
    h, final_state = operators.linear_scan(
        a, b, initial_state, cu_seqlens, reverse, return_final_state, backend
    )
    return (h, final_state) if return_final_state else h


def _check_linear_scan(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    cu_seqlens: Tensor | None,
    return_final_state: bool,
) -> None:
    checks.dtype("b", b, checks.FLOATING)
    checks.ndim("b", b, 3, "[B, L, D]")
    checks.dtype("a", a, (b.dtype,))
    checks.device("a", a, b.device, "b")
    checks.broadcasts("a", a, b, "b")
    checks.boolean("reverse", reverse)
    checks.boolean("return_final_state", return_final_state)
    sequences = b.shape[0]
    if cu_seqlens is not None:
        checks.cu_seqlens(cu_seqlens, b, "b")
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        checks.tensor("initial_state", initial_state)
        checks.dtype("initial_state", initial_state, {b.dtype, checks.state_dtype(b.dtype)})
        axes = "[B, D]" if cu_seqlens is None else "[N, D]"
        checks.shape("initial_state", initial_state, (sequences, b.shape[2]), axes)
        checks.device("initial_state", initial_state, b.device, "b")
