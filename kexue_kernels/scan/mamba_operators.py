"""The registered operators of a Mamba mixer, and what they can serve: inference on CPU.

They are in the C++ extension alone. At one token the time goes to reading every weight once and,
in PyTorch, to some twenty small calls, of which `mamba_step` makes one; over a sequence, PyTorch's
convolution on CPU passes over memory again for every tap.
"""

from typing import Any

import torch
from torch import Tensor

from kexue_kernels import _extension, dispatch, registry
from kexue_kernels.checks import HALF_AND_SINGLE

LARGEST_BATCH = 8  # past it the products of matrices are too much of the work to do better


def serve(x: Tensor, backend: str) -> bool:
    """Whether the extension is there, and made for data such as x, which nothing records."""
    return (
        x.is_cpu
        and x.dtype in HALF_AND_SINGLE
        and x.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and dispatch.resolve(backend) in ("auto", "cpu")
        and _extension.load().module is not None
    )


def step_serves(x: Tensor, weights: list[Tensor], backend: str) -> bool:
    """Whether `mamba_step` is made for these weights and this many rows x too."""
    return (
        serve(x, backend)
        and x.shape[0] <= LARGEST_BATCH
        and not torch.is_autocast_enabled("cpu")
        and all(
            type(weight) in (Tensor, torch.nn.Parameter)  # not a quantised one, for instance
            and weight.dtype == x.dtype
            and weight.is_cpu
            and weight.is_contiguous()
            for weight in weights
        )
    )


def _out(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@registry.operator(
    "mamba_step(Tensor x, Tensor(a!) window, Tensor(b!) state, Tensor in_weight, "
    "Tensor? in_bias, Tensor taps, Tensor? conv_bias, Tensor x_weight, Tensor dt_weight, "
    "Tensor? dt_bias, Tensor A, Tensor D, Tensor out_weight, Tensor? out_bias, "
    "float? rms_eps) -> Tensor",
    fake=_out,
    vmap=registry.refuse_vmap("mamba_step updates its state in place"),
)
def mamba_step(
    x: Tensor,
    window: Tensor,
    state: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    taps: Tensor,
    conv_bias: Tensor | None,
    x_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    rms_eps: float | None,
) -> Tensor:
    """A mixer's y [batch, dim] for x; window [batch, K - 1 or more, d] and state [batch, d, n]
    become the next ones.

    Weights, window, x and the projections' biases share a dtype; taps [K, d], A [d, n], D and the
    other biases [d] are float32 and contiguous. dt, B and C are divided by their root mean
    squares where there is `rms_eps`.
    """
    from kexue_kernels.scan import cpu_mamba  # needs the extension

    out = x.new_empty(x.shape)
    projections = (in_weight, in_bias), (x_weight, None), (dt_weight, None), (out_weight, out_bias)
    cpu_mamba.step(x, window, state, projections, (taps, conv_bias, A, D, dt_bias), rms_eps, out)
    torch.autograd.graph.increment_version((window, state))
    return out


def _convolved(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@registry.operator(
    "causal_conv(Tensor x, Tensor? window, Tensor taps, Tensor? bias, bool silu) -> Tensor",
    fake=_convolved,
    setup_context=registry.keep_nothing,
    backward=registry.refuse_gradient("causal_conv"),
)
def causal_conv(
    x: Tensor, window: Tensor | None, taps: Tensor, bias: Tensor | None, silu: bool
) -> Tensor:
    """The convolution of x [B, L, d] behind window [B, K - 1, d] (zeros if None), of its dtype.

    taps [K, d], the last of which meets the newest input, and bias [d] are float32 and contiguous.
    """
    from kexue_kernels.scan import cpu_mamba  # needs the extension

    y = x.new_empty(x.shape)
    cpu_mamba.convolve(x, window, taps, bias, silu, y)
    return y
