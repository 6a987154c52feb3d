"""The layout of mamba-ssm's selective_scan_fn, [B, D, L], as views of the channels-last one."""

from collections.abc import Callable

import torch
from torch import Tensor

from kexue_kernels import checks

Scan = Callable[..., Tensor | tuple[Tensor, Tensor]]


def channels_first(selective_scan: Scan) -> Scan:
    """A function of selective_scan_fn's arguments that calls `selective_scan`."""

    def call(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        return_last_state: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        _check(u, delta, A, B, C, z)
        checks.boolean("return_last_state", return_last_state)
        result = selective_scan(
            u.mT,
            delta.mT,
            A,
            _channels_last(B, A),
            _channels_last(C, A),
            D,
            None if z is None else z.mT,
            delta_bias,
            delta_softplus,
            return_final_state=return_last_state,
        )
        if isinstance(result, tuple):
            return result[0].mT, result[1]
        return result.mT

    return call


def _check(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None) -> None:
    """What has to hold before anything is viewed in another layout."""
    for name, value in (("u", u), ("delta", delta), ("z", u if z is None else z)):
        checks.tensor(name, value)
        checks.ndim(name, value, 3, "[B, D, L]")
        checks.shape(name, value, tuple(u.shape), "[B, D, L]")
    checks.tensor("A", A)
    for name, value in (("B", B), ("C", C)):
        checks.tensor(name, value)
        if value.ndim not in (2, 3, 4):
            raise ValueError(
                f"{name}: expected shape [D, N], [B, N, L] or [B, G, N, L] (2L, interleaved, "
                f"where A is complex), got {list(value.shape)}"
            )
        if value.ndim > 2:
            _check_steps(name, value, u, A)


def _check_steps(name: str, value: Tensor, u: Tensor, A: Tensor) -> None:
    steps = u.shape[2] * (2 if A.is_complex() else 1)
    if value.shape[-1] != steps:
        kind = "2L, real and imaginary parts interleaved (A is complex)," if A.is_complex() else "L"
        raise ValueError(
            f"{name}: expected a last axis of {kind} = {steps}, got {list(value.shape)}"
        )
    checks.dtype(name, value, checks.REAL)  # where A is complex, interleaved


def _channels_last(matrix: Tensor, A: Tensor) -> Tensor:
    """[.., N, L], or interleaved [.., N, 2L], as [B, L, N] or [B, L, G, N]."""
    if matrix.ndim == 2:
        return matrix
    if A.is_complex():
        pairs = matrix.to(A.real.dtype).unflatten(-1, (-1, 2)).contiguous()
        matrix = torch.view_as_complex(pairs)
    return matrix.mT if matrix.ndim == 3 else matrix.permute(0, 3, 1, 2)
