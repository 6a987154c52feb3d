"""The Mamba block's mixer: projections, a short convolution and the selective scan."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue_kernels import checks, dispatch
from kexue_kernels.nn import arguments
from kexue_kernels.nn.scan.mixing import mix, mix_step

__all__ = ["MambaMixer", "MambaState"]


class MambaState(NamedTuple):
    """What a `MambaMixer` remembers of the steps before."""

    window: Tensor  # [B, conv_kernel - 1, d]: the convolution's last inputs
    ssm: Tensor  # [B, d, state_dim], float32 (float64 in a float64 module)


class MambaMixer(nn.Module):
    """Mamba's mixer: a causal convolution and a selective scan between two projections.

        u, z = in_proj(x)
        u = silu(conv1d(u))                         causal, each channel on its own
        dt, B, C = x_proj(u),  delta = dt_proj(dt)
        y = out_proj(selective_scan(u, softplus(delta), -exp(A_log), B, C, D) * silu(z))

    Args:
        dim: channels of the input and of the output.
        state_dim: n, states of each inner channel.
        conv_kernel: taps of the convolution.
        expand: inner channels d are expand * dim.
        dt_rank: inner width of the projection to delta; "auto" is dim / 16, rounded up.
        dt_min, dt_max: softplus(dt_proj.bias) starts log-uniform between them.
        conv_bias: whether the convolution has a bias.
        bias: whether `in_proj` and `out_proj` have.
        device, dtype: of the parameters; float32, bfloat16, float16 or float64 (None: PyTorch's
            defaults).
        backend: what serves the scan, as in `kexue_kernels.selective_scan`.

    Parameters, named as in mamba-ssm and Transformers: `in_proj` [2 d, dim], `conv1d` [d, 1,
    conv_kernel], `x_proj` [dt_rank + 2 n, d], `dt_proj` [d, dt_rank], `A_log` [d, n], `D` [d],
    `out_proj` [dim, d].

    The scan runs in float32 (float64 in a float64 module) whatever the dtype of the module.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a size, range, shape, dtype or device that doesn't fit, named.
        BackendUnavailableError: a forced backend that can't serve the call.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"
    (2023), arXiv 2312.00752: section 3.4, figure 3.
    """

    act = staticmethod(F.silu)

    def __init__(
        self,
        dim: int,
        state_dim: int = 16,
        conv_kernel: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        *,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        conv_bias: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "state_dim": state_dim, "conv_kernel": conv_kernel, "expand": expand}
        for name, value in sizes.items():
            arguments.size(name, value)
        if isinstance(dt_rank, str):
            arguments.one_of("dt_rank", dt_rank, ("auto",))
            dt_rank = math.ceil(dim / 16)
        arguments.size("dt_rank", dt_rank)
        arguments.step_range(dt_min, dt_max)
        checks.boolean("conv_bias", conv_bias)
        checks.boolean("bias", bias)
        arguments.parameter_dtype(dtype)
        self.dim, self.state_dim, self.conv_kernel = dim, state_dim, conv_kernel
        self.expand, self.dt_rank, self.inner = expand, dt_rank, expand * dim
        self.dt_min, self.dt_max = float(dt_min), float(dt_max)
        self.backend = dispatch.check_name(backend)

        d = self.inner
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(dim, 2 * d, bias=bias, **where)
        self.conv1d = nn.Conv1d(
            d, d, conv_kernel, groups=d, padding=conv_kernel - 1, bias=conv_bias, **where
        )
        self.x_proj = nn.Linear(d, dt_rank + 2 * state_dim, bias=False, **where)
        self.dt_proj = nn.Linear(dt_rank, d, **where)
        self.A_log = nn.Parameter(torch.empty(d, state_dim, **where))
        self.D = nn.Parameter(torch.empty(d, **where))
        self.out_proj = nn.Linear(d, dim, bias=bias, **where)
        self._reset_scan()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters afresh."""
        for part in (self.in_proj, self.conv1d, self.x_proj, self.dt_proj, self.out_proj):
            part.reset_parameters()
        self._reset_scan()

    @torch.no_grad()
    def _reset_scan(self) -> None:
        self.A_log.copy_(torch.arange(1, self.state_dim + 1, dtype=torch.float64).log())
        self.D.fill_(1)
        self.dt_proj.weight.uniform_(-(self.dt_rank**-0.5), self.dt_rank**-0.5)
        log_dt = torch.empty_like(self.D, dtype=torch.float64)
        dt = log_dt.uniform_(math.log(self.dt_min), math.log(self.dt_max)).exp()
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt

    def initial_state(self, batch: int) -> MambaState:
        """Zeros for `batch` rows."""
        arguments.size("batch", batch, smallest=0)
        window = self.D.new_zeros(batch, self.conv_kernel - 1, self.inner)
        shape, dtype = (batch, self.inner, self.state_dim), checks.state_dtype(self.D.dtype)
        return MambaState(window, self.D.new_zeros(shape, dtype=dtype))

    def forward(
        self,
        x: Tensor,
        state: MambaState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, MambaState]:
        """y [B, L, dim] for x [B, L, dim], in x's dtype.

        Args:
            x: in the module's dtype; under autocast float32, bfloat16 or float16.
            state: what was remembered before the first step, as `initial_state` makes it; zeros
                if None.
            cu_seqlens: boundaries of N sequences packed along L in a batch of 1, as in
                `kexue_kernels.selective_scan`; states then have N rows.
            return_state: also return what to go on from.
        """
        arguments.data(x, self.dim, "[B, L, dim]", self.D)
        checks.boolean("return_state", return_state)
        rows = arguments.state_rows(x, cu_seqlens)
        window, ssm = (None, None) if state is None else self._checked(state, rows)
        y, window, ssm = mix(self, x, window, ssm, cu_seqlens=cu_seqlens, backend=self.backend)
        y = y.to(x.dtype)
        return (y, MambaState(window.to(self.D.dtype), ssm)) if return_state else y

    def step(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """One step of generation: (y [B, dim], the next state) from x [B, dim] and the state."""
        arguments.data(x, self.dim, "[B, dim]", self.D)
        window, ssm = self._checked(state, x.shape[0])
        if torch.is_grad_enabled():  # by the scan, which has gradients
            y, window, ssm = mix(self, x[:, None], window, ssm, backend=self.backend)
        else:
            window, ssm = window.clone(), ssm.clone()
            y = mix_step(self, x[:, None], window, ssm, backend=self.backend)
        return y[:, 0].to(x.dtype), MambaState(window.to(self.D.dtype), ssm)

    def _checked(self, state: object, rows: int) -> tuple[Tensor, Tensor]:
        if not isinstance(state, tuple) or len(state) != 2:
            raise TypeError(f"state: expected a MambaState, got {type(state).__name__}")
        window, ssm = state
        shape = rows, self.conv_kernel - 1, self.inner
        axes = "[B or N, conv_kernel - 1, d]"
        arguments.state(window, shape, axes, self.D.dtype, self.D, "state.window")
        shape, dtype = (rows, self.inner, self.state_dim), checks.state_dtype(self.D.dtype)
        arguments.state(ssm, shape, "[B or N, d, state_dim]", dtype, self.D, "state.ssm")
        return window, ssm

    def extra_repr(self) -> str:
        """The sizes, and the backend if it is not "auto"."""
        forced = "" if self.backend == "auto" else f", backend={self.backend!r}"
        return f"{self.dim}, state_dim={self.state_dim}, dt_rank={self.dt_rank}{forced}"
