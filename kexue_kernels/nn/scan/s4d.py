"""S4D: the diagonal state space model, as a convolution and as a recurrence."""

import math

import torch
from torch import Tensor, nn

from kexue_kernels import checks, dispatch
from kexue_kernels.nn import arguments
from kexue_kernels.scan import linear_scan, selective_scan

__all__ = ["S4D"]

_INITS = ("lin", "inv", "real")
_DISCRETIZATIONS = ("zoh", "bilinear")
_MODES = ("auto", "convolution", "recurrence")
_DECAY_LOG_RANGE = (math.log(1e-6), math.log(1e6))  # -Re A neither vanishes nor overflows
_RUN = 128  # steps of the kernel that share a factor: powers of dA are kept for L / _RUN + _RUN


class S4D(nn.Module):
    """A diagonal state space model for each channel: x' = A x + u, y = 2 Re(C x) + D u.

    Each channel has its own step dt, by which the system is discretised,

        x_t = dA x_{t-1} + dB u_t,    y_t = 2 Re(C x_t) + D u_t
        zoh:       dA = exp(dt A),                         dB = (exp(dt A) - 1) / A
        bilinear:  dA = (1 + dt A / 2) / (1 - dt A / 2),   dB = dt / (1 - dt A / 2)

    (B is one: it would only scale C). y is a convolution of u with K_l = 2 Re(sum_n C dA^l dB),
    done by FFT; or, where a state goes in or out, the recurrence (for "bilinear" it keeps all
    states, [B, L, dim, modes]). `state_dim` counts real
    numbers: "lin" and "inv" have state_dim / 2 complex modes, one of each conjugate pair (so the
    2 Re); "real" has state_dim real modes, and y_t = C x_t + D u_t.

    Args:
        dim: channels of the input and of the output, independent of each other.
        state_dim: N, real numbers of state for each channel; even unless `init` is "real".
        init: what A starts from, n = 0, 1, ...: "lin" is -1/2 + i pi n, "inv" is
            -1/2 + i N/pi (N / (2n + 1) - 1), "real" is -(n + 1).
        discretization: "zoh" or "bilinear".
        dt_min, dt_max: log dt starts uniform between their logarithms.
        mode: "convolution", "recurrence", or "auto": the convolution, but for calls with
            a state or packed sequences.
        device, dtype: of the parameters; float32, bfloat16, float16 or float64 (None: PyTorch's
            defaults).
        backend: what serves the recurrence, as in `kexue_kernels.selective_scan`.

    Parameters, all real: `log_dt` [dim]; `A_real_log` [dim, modes], Re A = -exp(A_real_log);
    `A_imag` [dim, modes]; `C_re`, `C_im` [dim, modes] (no `A_imag` and `C_im` for "real"); `D`
    [dim]. Re A is held between -1e6 and -1e-6, so |dA| < 1 but for rounding.

    The layer is linear in x: the activation and the mixing of channels are left to its user.
    States and kernels are computed in complex64 (complex128 in a float64 module; real for
    "real") whatever the dtype of the module, under autocast too.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a size, range, shape, dtype or device that doesn't fit, named; a state or
            cu_seqlens where `mode` is "convolution".
        BackendUnavailableError: a forced backend that can't serve the recurrence.

    Source: Gu et al., "On the Parameterization and Initialization of Diagonal State Space
    Models" (2022), arXiv 2206.11893: sections 3 and 4.
    """

    A_imag: Tensor | None
    C_im: Tensor | None

    def __init__(
        self,
        dim: int,
        state_dim: int,
        *,
        init: str = "lin",
        discretization: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        mode: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        arguments.size("dim", dim)
        arguments.size("state_dim", state_dim)
        arguments.one_of("init", init, _INITS)
        arguments.one_of("discretization", discretization, _DISCRETIZATIONS)
        arguments.one_of("mode", mode, _MODES)
        arguments.step_range(dt_min, dt_max)
        arguments.parameter_dtype(dtype)
        self.is_complex = init != "real"
        if self.is_complex and state_dim % 2:
            raise ValueError(f"state_dim: expected an even number for {init!r}, got {state_dim}")
        self.dim, self.state_dim = dim, state_dim
        self.modes = state_dim // 2 if self.is_complex else state_dim
        self.init, self.discretization, self.mode = init, discretization, mode
        self.dt_min, self.dt_max = float(dt_min), float(dt_max)
        self.backend = dispatch.check_name(backend)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.log_dt, self.D = parameter(dim), parameter(dim)
        self.A_real_log, self.C_re = parameter(dim, self.modes), parameter(dim, self.modes)
        self.A_imag = parameter(dim, self.modes) if self.is_complex else None
        self.C_im = parameter(dim, self.modes) if self.is_complex else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set A as `init` says and draw the other parameters afresh."""
        self.log_dt.uniform_(math.log(self.dt_min), math.log(self.dt_max))
        n = torch.arange(self.modes, dtype=torch.float64)
        N = self.state_dim
        self.A_real_log.copy_((n + 1).log() if self.init == "real" else torch.tensor(0.5).log())
        if self.A_imag is not None:
            lin, inv = math.pi * n, N / math.pi * (N / (2 * n + 1) - 1)
            self.A_imag.copy_(lin if self.init == "lin" else inv)
        self.C_re.normal_(std=self.state_dim**-0.5)
        if self.C_im is not None:
            self.C_im.normal_(std=self.state_dim**-0.5)
        self.D.normal_()

    def initial_state(self, batch: int) -> Tensor:
        """Zeros [batch, dim, modes]: complex64 (complex128), for "real" float32 (float64)."""
        arguments.size("batch", batch, smallest=0)
        shape = (batch, self.dim, self.modes)
        return torch.zeros(shape, dtype=self._state_dtype(), device=self.D.device)

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
            state: the state before the first step, [B, dim, modes] as `initial_state` makes
                it; zeros if None.
            cu_seqlens: boundaries of N sequences packed along L in a batch of 1, as in
                `kexue_kernels.selective_scan`; states are then [N, dim, modes].
            return_state: also return the last state, to go on from.
        """
        arguments.data(x, self.dim, "[B, L, dim]", self.D)
        checks.boolean("return_state", return_state)
        rows = arguments.state_rows(x, cu_seqlens)
        if state is not None:
            self._check_state(state, rows)
        alone = state is None and cu_seqlens is None and not return_state
        if self.mode == "convolution" and not alone:
            raise ValueError('mode: expected "auto" or "recurrence" for a state or cu_seqlens')
        if alone and x.numel() and self.mode != "recurrence":
            return self._convolution(x)
        return self._recurrence(x, state, cu_seqlens, return_state)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step of generation: (y [B, dim], the next state) from x [B, dim] and the state."""
        arguments.data(x, self.dim, "[B, dim]", self.D)
        self._check_state(state, x.shape[0])
        dA, dB = self._discretized()
        state = dA * state + dB * x.to(self._real_dtype())[..., None]
        return self._read(state, x), state

    def kernel(self, length: int) -> Tensor:
        """K [dim, length], the response to an impulse: float32, or float64 in a float64 module."""
        arguments.size("length", length, smallest=0)
        dA, dB = self._discretized()
        run = _powers(dA, _RUN)  # [dim, modes, _RUN]
        start = _powers(run[..., -1] * dA, -(-length // _RUN))  # [dim, modes, L / _RUN]
        start = start * (self._readout() * dB)[..., None]
        if self.is_complex:  # 2 Re(a b), as a real product over (re or im, mode)
            run = torch.cat((2 * run.real, -2 * run.imag), dim=1)
            start = torch.cat((start.real, start.imag), dim=1)
        return (start.mT @ run).flatten(1)[:, :length]

    def _convolution(self, x: Tensor) -> Tensor:
        L, wide = x.shape[1], x.to(self._real_dtype())
        spectrum = torch.fft.rfft(self.kernel(L).T, n=2 * L, dim=0)
        y = torch.fft.irfft(torch.fft.rfft(wide, n=2 * L, dim=1) * spectrum, n=2 * L, dim=1)
        return (y[:, :L] + self.D * wide).to(x.dtype)

    def _recurrence(
        self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        if self.discretization == "zoh":
            return self._selective(x, state, cu_seqlens, return_state)
        dA, dB = self._discretized()
        drive = (x.to(dB.real.dtype)[..., None] * dB).flatten(2)  # [B, L, dim * modes]
        before = None if state is None else state.flatten(1)
        found = linear_scan(
            dA.flatten(),
            drive,
            before,
            cu_seqlens=cu_seqlens,
            return_final_state=True,
            backend=self.backend,
        )
        h, last = (part.unflatten(-1, dA.shape) for part in found)
        y = self._read(h, x)
        return (y, last) if return_state else y

    def _selective(
        self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """By selective_scan, which keeps no states: with steps of one, its A is dt A here."""
        return selective_scan(
            x,
            x.new_ones(()).expand(x.shape),
            self._dt() * self._A(),
            self._discretized()[1],
            self._readout(),
            self.D,
            initial_state=state,
            return_final_state=return_state,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )

    def _read(self, h: Tensor, x: Tensor) -> Tensor:
        """C h + D x in x's dtype, 2 Re(C h) where complex; h [.., dim, modes], x [.., dim]."""
        y = (h * self._readout()).sum(-1)
        y = 2 * y.real if self.is_complex else y
        return (y + self.D * x.to(y.dtype)).to(x.dtype)

    def _dt(self) -> Tensor:
        return self.log_dt.to(self._real_dtype()).exp()[:, None]

    def _A(self) -> Tensor:
        real = self._real_dtype()
        decay = -self.A_real_log.to(real).clamp(*_DECAY_LOG_RANGE).exp()
        return decay if self.A_imag is None else torch.complex(decay, self.A_imag.to(real))

    def _readout(self) -> Tensor:
        real = self._real_dtype()
        C = self.C_re.to(real)
        return C if self.C_im is None else torch.complex(C, self.C_im.to(real))

    def _discretized(self) -> tuple[Tensor, Tensor]:
        """dA and dB, [dim, modes]."""
        dt, A = self._dt(), self._A()
        if self.discretization == "zoh":
            return torch.exp(dt * A), torch.expm1(dt * A) / A
        below = 1 - dt * A / 2
        return (1 + dt * A / 2) / below, dt / below

    def _check_state(self, state: Tensor, rows: int) -> None:
        shape = (rows, self.dim, self.modes)
        arguments.state(state, shape, "[B or N, dim, modes]", self._state_dtype(), self.D)

    def _real_dtype(self) -> torch.dtype:
        return checks.state_dtype(self.D.dtype)

    def _state_dtype(self) -> torch.dtype:
        return checks.complex_dtype(self.D.dtype) if self.is_complex else self._real_dtype()

    def extra_repr(self) -> str:
        """The sizes, and what is not the default."""
        defaults = {"init": "lin", "discretization": "zoh", "mode": "auto", "backend": "auto"}
        told = {name: getattr(self, name) for name in defaults}
        said = [f", {name}={told[name]!r}" for name in defaults if told[name] != defaults[name]]
        return f"{self.dim}, {self.state_dim}{''.join(said)}"


def _powers(base: Tensor, count: int) -> Tensor:
    """base^0, base^1, ...: [.., count], by doubling (products alone: a base of 0 is no trouble)."""
    found, square = torch.ones_like(base)[..., None], base[..., None]
    while found.shape[-1] < count:
        found = torch.cat((found, found * square), dim=-1)
        square = square * square
    return found[..., :count]
