"""The Real-Gated Linear Recurrent Unit."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue_kernels import checks, dispatch
from kexue_kernels.nn import arguments
from kexue_kernels.scan import linear_scan

__all__ = ["RGLRU"]


class RGLRU(nn.Module):
    """The Real-Gated LRU of Griffin: a real diagonal recurrence whose decay the input gates.

        r_t = sigmoid(W_a x_t + b_a),    i_t = sigmoid(W_x x_t + b_x)
        a_t = sigmoid(Lambda)^(c r_t)
        h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * (i_t * x_t),    y_t = h_t

    At the start sigmoid(Lambda)^c is uniform in [a_min, a_max]. Where r_t is so small that a_t
    rounds to 1, the square root is still right, and so is its gradient: both are taken of
    -expm1(2 log a_t).

    Args:
        dim: channels of the input, the recurrence and the output.
        num_blocks: W_a and W_x are block-diagonal with so many blocks; it divides dim.
        c: how many times the decay at r_t = 1 is that of sigmoid(Lambda).
        a_min, a_max: where the smallest decays start, 0 < a_min <= a_max < 1.
        device, dtype: of the parameters; float32, bfloat16, float16 or float64 (None: PyTorch's
            defaults).
        backend: what serves the recurrence, as in `kexue_kernels.linear_scan`.

    Parameters: `Lambda` [dim] (-`recurrent_param` of RecurrentGemma); `recurrent_gate_weight`,
    `input_gate_weight` [num_blocks, in, out] with in = out = dim / num_blocks, and
    `recurrent_gate_bias`, `input_gate_bias` [num_blocks, out], as RecurrentGemma's.

    The recurrence runs in float32 (float64 in a float64 module) whatever the dtype of the
    module, under autocast too; the gates' products run in the module's dtype, or in autocast's.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a size, range, shape, dtype or device that doesn't fit, named.
        BackendUnavailableError: a forced backend that can't serve the call.

    Source: De et al., "Griffin: Mixing Gated Linear Recurrences with Local Attention for
    Efficient Language Models" (2024), arXiv 2402.19427: equations 1 to 4, appendix A.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_blocks: int = 1,
        c: float = 8.0,
        a_min: float = 0.9,
        a_max: float = 0.999,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        arguments.size("dim", dim)
        arguments.size("num_blocks", num_blocks)
        if dim % num_blocks:
            raise ValueError(f"num_blocks: expected a divisor of dim = {dim}, got {num_blocks}")
        _check_decay(c, a_min, a_max)
        arguments.parameter_dtype(dtype)
        self.dim, self.num_blocks = dim, num_blocks
        self.c, self.a_min, self.a_max = float(c), float(a_min), float(a_max)
        self.backend = dispatch.check_name(backend)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        width = dim // num_blocks
        self.Lambda = parameter(dim)
        self.recurrent_gate_weight = parameter(num_blocks, width, width)
        self.recurrent_gate_bias = parameter(num_blocks, width)
        self.input_gate_weight = parameter(num_blocks, width, width)
        self.input_gate_bias = parameter(num_blocks, width)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters afresh."""
        full = torch.empty_like(self.Lambda, dtype=torch.float64)  # sigmoid(Lambda)^c
        log_sigmoid = full.uniform_(self.a_min, self.a_max).log() / self.c
        self.Lambda.copy_(log_sigmoid - torch.log(-torch.expm1(log_sigmoid)))
        for weight in (self.recurrent_gate_weight, self.input_gate_weight):
            weight.normal_(std=weight.shape[1] ** -0.5)
        for bias in (self.recurrent_gate_bias, self.input_gate_bias):
            bias.zero_()

    def initial_state(self, batch: int) -> Tensor:
        """Zeros [batch, dim]: float32, or float64 in a float64 module."""
        arguments.size("batch", batch, smallest=0)
        return torch.zeros(batch, self.dim, dtype=self._state_dtype(), device=self.Lambda.device)

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """y [B, L, dim] for x [B, L, dim], in x's dtype.

        Args:
            x: in the module's dtype; under autocast float32, bfloat16 or float16.
            state: h before the first step, [B, dim] as `initial_state` makes it; zeros if None.
            cu_seqlens: boundaries of N sequences packed along L in a batch of 1, as in
                `kexue_kernels.linear_scan`; states are then [N, dim].
            return_state: also return the last state, to go on from.
        """
        arguments.data(x, self.dim, "[B, L, dim]", self.Lambda)
        checks.boolean("return_state", return_state)
        rows = arguments.state_rows(x, cu_seqlens)
        if state is not None:
            self._check_state(state, rows)
        decay, drive = self._gated(x)
        found = linear_scan(
            decay,
            drive,
            state,
            cu_seqlens=cu_seqlens,
            return_final_state=return_state,
            backend=self.backend,
        )
        if isinstance(found, Tensor):
            return found.to(x.dtype)
        h, final_state = found
        return h.to(x.dtype), final_state

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step of generation: (y [B, dim], the next state) from x [B, dim] and the state."""
        arguments.data(x, self.dim, "[B, dim]", self.Lambda)
        self._check_state(state, x.shape[0])
        decay, drive = self._gated(x)
        state = decay * state + drive
        return state.to(x.dtype), state

    def _gated(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and sqrt(1 - a_t^2) * i_t * x_t, both [.., dim] in the state's dtype."""
        real = self._state_dtype()
        blocks = x.unflatten(-1, (self.num_blocks, -1))  # [.., num_blocks, in]
        r = self._gate(blocks, self.recurrent_gate_weight, self.recurrent_gate_bias)
        i = self._gate(blocks, self.input_gate_weight, self.input_gate_bias)
        log_a = -self.c * F.softplus(-self.Lambda.to(real)) * r
        squared = -torch.expm1(2 * log_a)  # 1 - a^2
        # Below the smallest normal number the root's slope is infinite times nothing.
        scale = squared.clamp(min=torch.finfo(real).tiny).sqrt()
        return log_a.exp(), scale * i * x.to(real)

    def _gate(self, blocks: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        product = torch.einsum("...ki,kio->...ko", blocks, weight)
        return torch.sigmoid((product + bias).to(self._state_dtype())).flatten(-2)

    def _check_state(self, state: Tensor, rows: int) -> None:
        shape = (rows, self.dim)
        arguments.state(state, shape, "[B or N, dim]", self._state_dtype(), self.Lambda)

    def _state_dtype(self) -> torch.dtype:
        return checks.state_dtype(self.Lambda.dtype)

    def extra_repr(self) -> str:
        """The sizes, and the backend if it is not "auto"."""
        blocks = "" if self.num_blocks == 1 else f", num_blocks={self.num_blocks}"
        forced = "" if self.backend == "auto" else f", backend={self.backend!r}"
        return f"{self.dim}{blocks}{forced}"


def _check_decay(c: float, a_min: float, a_max: float) -> None:
    for name, value in (("c", c), ("a_min", a_min), ("a_max", a_max)):
        arguments.number(name, value)
    if not 0 < c < math.inf:
        raise ValueError(f"c: expected a positive number, got {c}")
    if not 0 < a_min < 1:
        raise ValueError(f"a_min: expected a decay between 0 and 1, got {a_min}")
    if not a_min <= a_max < 1:
        raise ValueError(f"a_max: expected a decay from a_min = {a_min} to below 1, got {a_max}")
