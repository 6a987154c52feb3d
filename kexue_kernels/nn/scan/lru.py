"""The Linear Recurrent Unit."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue_kernels import checks, dispatch
from kexue_kernels.nn import arguments
from kexue_kernels.scan import linear_scan

__all__ = ["LRU"]

# nu = -log|lambda| stays in here: |lambda| rounds below 1 in float32, and exp(nu_log) is finite.
_NU_LOG_RANGE = (math.log(5e-7), math.log(100.0))


class LRU(nn.Module):
    """The Linear Recurrent Unit: a diagonal complex recurrence between two projections.

        h_t = lambda * h_{t-1} + gamma * (B x_t),    y_t = Re(C h_t) + D * x_t
        lambda = exp(-exp(nu_log) + i exp(theta_log)),    gamma = exp(gamma_log)

    |lambda| < 1 whatever values the parameters take (in float32: exp(nu_log) is held between
    5e-7 and 100). At the start |lambda|^2 is uniform in [r_min^2, r_max^2], the phase uniform
    in [0, max_phase], and gamma = sqrt(1 - |lambda|^2), so that h neither grows nor fades with
    |lambda|.

    Args:
        dim: channels of the input and of the output.
        state_dim: complex channels of the recurrence.
        r_min, r_max: the ring that |lambda| starts in, 0 <= r_min <= r_max <= 1.
        max_phase: the largest phase that lambda starts with, in (0, 2 pi].
        device, dtype: of the parameters; float32, bfloat16, float16 or float64 (None: PyTorch's
            defaults).
        backend: what serves the recurrence, as in `kexue_kernels.linear_scan`.

    Parameters, all real: `nu_log`, `theta_log`, `gamma_log` [state_dim]; `B_re`, `B_im`
    [state_dim, dim]; `C_re`, `C_im` [dim, state_dim]; `D` [dim].

    The recurrence runs in complex64 (complex128 in a float64 module) whatever the dtype of the
    module, under autocast too; the projections run in the module's dtype, or in autocast's.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a size, range, shape, dtype or device that doesn't fit, named.
        BackendUnavailableError: a forced backend that can't serve the call.

    Source: Orvieto et al., "Resurrecting Recurrent Neural Networks for Long Sequences" (2023),
    arXiv 2303.06349: equations 3 and 7, lemma 3.2, appendix A.
    """

    def __init__(
        self,
        dim: int,
        state_dim: int,
        *,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        arguments.size("dim", dim)
        arguments.size("state_dim", state_dim)
        _check_ring(r_min, r_max, max_phase)
        arguments.parameter_dtype(dtype)
        self.dim, self.state_dim = dim, state_dim
        self.r_min, self.r_max, self.max_phase = float(r_min), float(r_max), float(max_phase)
        self.backend = dispatch.check_name(backend)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.nu_log, self.theta_log, self.gamma_log = (parameter(state_dim) for _ in range(3))
        self.B_re, self.B_im = parameter(state_dim, dim), parameter(state_dim, dim)
        self.C_re, self.C_im = parameter(dim, state_dim), parameter(dim, state_dim)
        self.D = parameter(dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters afresh."""
        squared = torch.empty_like(self.nu_log, dtype=torch.float64)  # |lambda|^2
        squared.uniform_(self.r_min**2, self.r_max**2).clamp_(1e-12, 1 - 1e-6)
        phase = torch.empty_like(squared).uniform_(0, self.max_phase).clamp_(min=1e-12)
        self.nu_log.copy_((-0.5 * squared.log()).log())
        self.theta_log.copy_(phase.log())
        self.gamma_log.copy_(0.5 * (1 - squared).log())
        for weight in (self.B_re, self.B_im):
            weight.normal_(std=(2 * self.dim) ** -0.5)
        for weight in (self.C_re, self.C_im):
            weight.normal_(std=self.state_dim**-0.5)
        self.D.normal_()

    def eigenvalues(self) -> Tensor:
        """lambda [state_dim]: complex64, or complex128 in a float64 module."""
        real = self._real_dtype()
        nu = self.nu_log.to(real).clamp(*_NU_LOG_RANGE).exp()
        return torch.polar(torch.exp(-nu), self.theta_log.to(real).exp())

    def initial_state(self, batch: int) -> Tensor:
        """Zeros [batch, state_dim]: complex64, or complex128 in a float64 module."""
        arguments.size("batch", batch, smallest=0)
        device = self.D.device
        return torch.zeros(batch, self.state_dim, dtype=self._state_dtype(), device=device)

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        *,
        reverse: bool = False,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """y [B, L, dim] for x [B, L, dim], in x's dtype.

        Args:
            x: in the module's dtype; under autocast float32, bfloat16 or float16.
            state: h before the first step, [B, state_dim] as `initial_state` makes it; zeros if
                None.
            reverse: run the recurrence from the last step to the first.
            cu_seqlens: boundaries of N sequences packed along L in a batch of 1, as in
                `kexue_kernels.linear_scan`; states are then [N, state_dim].
            return_state: also return the last state, to go on from.
        """
        arguments.data(x, self.dim, "[B, L, dim]", self.D)
        checks.boolean("return_state", return_state)
        rows = arguments.state_rows(x, cu_seqlens)
        if state is not None:
            self._check_state(state, rows)
        found = linear_scan(
            self.eigenvalues(),
            self._drive(x),
            state,
            reverse=reverse,
            cu_seqlens=cu_seqlens,
            return_final_state=return_state,
            backend=self.backend,
        )
        if isinstance(found, Tensor):
            return self._read(found, x)
        h, final_state = found
        return self._read(h, x), final_state

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step of generation: (y [B, dim], the next state) from x [B, dim] and the state."""
        arguments.data(x, self.dim, "[B, dim]", self.D)
        self._check_state(state, x.shape[0])
        # The products one by one: for few rows, laying out weights anew would cost more.
        real = self._real_dtype()
        gamma = self.gamma_log.to(real).exp()
        drive_re, drive_im = (F.linear(x, B).to(real) * gamma for B in (self.B_re, self.B_im))
        state = self.eigenvalues() * state + torch.complex(drive_re, drive_im)
        re, im = state.real.to(x.dtype), state.imag.to(x.dtype)
        y = F.linear(re, self.C_re) - F.linear(im, self.C_im)
        return (y + self.D * x).to(x.dtype), state

    def _drive(self, x: Tensor) -> Tensor:
        """gamma * (B x), complex [B, L, state_dim]: one real product, re and im interleaved."""
        real = self._real_dtype()
        pairs = torch.stack((self.B_re, self.B_im), dim=1).to(real)  # [state_dim, 2, dim]
        weight = pairs * self.gamma_log.to(real).exp()[:, None, None]
        product = F.linear(x, weight.flatten(0, 1).to(self.D.dtype))
        return torch.view_as_complex(product.to(real).unflatten(-1, (self.state_dim, 2)))

    def _read(self, h: Tensor, x: Tensor) -> Tensor:
        """Re(C h) + D x in x's dtype: one real product, as Re(C h) = C_re h_re - C_im h_im."""
        real = self._real_dtype()
        weight = torch.view_as_real(torch.complex(self.C_re.to(real), -self.C_im.to(real)))
        pairs = torch.view_as_real(h).flatten(-2).to(x.dtype)  # [B, L, 2 state_dim]
        y = F.linear(pairs, weight.flatten(1).to(self.D.dtype))
        return (y + self.D * x).to(x.dtype)

    def _check_state(self, state: Tensor, rows: int) -> None:
        shape = (rows, self.state_dim)
        arguments.state(state, shape, "[B or N, state_dim]", self._state_dtype(), self.D)

    def _real_dtype(self) -> torch.dtype:
        return checks.state_dtype(self.D.dtype)

    def _state_dtype(self) -> torch.dtype:
        return checks.complex_dtype(self.D.dtype)

    def extra_repr(self) -> str:
        """The sizes, and the backend if it is not "auto"."""
        forced = "" if self.backend == "auto" else f", backend={self.backend!r}"
        return f"{self.dim}, {self.state_dim}{forced}"


def _check_ring(r_min: float, r_max: float, max_phase: float) -> None:
    for name, value in (("r_min", r_min), ("r_max", r_max), ("max_phase", max_phase)):
        arguments.number(name, value)
    if not 0 <= r_min <= 1:
        raise ValueError(f"r_min: expected a radius from 0 to 1, got {r_min}")
    if not r_min <= r_max <= 1:
        raise ValueError(f"r_max: expected a radius from r_min = {r_min} to 1, got {r_max}")
    if not 0 < max_phase <= 2 * math.pi:
        raise ValueError(f"max_phase: expected an angle in (0, 2 pi], got {max_phase}")
