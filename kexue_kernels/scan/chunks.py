"""What every backend of selective_scan agrees on: what it is given, where states are kept, and
what comes back."""

from typing import NamedTuple

from torch import Tensor


def chunk_length(n: int) -> int:
    """Steps between two states that the forward keeps for the backward.

    It grows with n, so that the kept states are never more than [batch, L, d].
    """
    return 32 * -(-n // 32)


class SelectiveInputs(NamedTuple):
    """What a launcher is given, made normal as selective_operators.py says."""

    u: Tensor  # [batch, L, d]
    delta: Tensor
    A: Tensor  # [d, n]
    B: Tensor  # [batch, L, groups, n], or [d, n]
    C: Tensor
    D: Tensor | None  # [d]
    z: Tensor | None  # [batch, L, d]
    delta_bias: Tensor | None
    initial_state: Tensor | None  # [batch, d, n]; packed: [N, d, n]
    cu_seqlens: Tensor | None  # [N + 1]
    delta_softplus: bool


class SelectiveGradients(NamedTuple):
    """The gradients of selective_scan's inputs, named as they are; None where there is none."""

    u: Tensor  # [batch, L, d]
    delta: Tensor
    A: Tensor  # [d, n]
    B: Tensor  # as B: [batch, L, groups, n], or [d, n]
    C: Tensor
    D: Tensor | None  # [d]
    z: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor | None  # [batch, d, n]; packed: [N, d, n]
