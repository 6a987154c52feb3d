"""Who computes selective_scan: this package's backends, plain PyTorch, and other packages."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kexue_kernels as kk
from kexue_kernels.benchmarks.case import Contestant, Function, Inputs

LOOP = "torch loop"
TRANSFORMERS = "Transformers' slow path"
MAMBAPY = "mambapy"
MAMBA_SSM = "mamba-ssm"


def ours(backend: str) -> Contestant:
    status = kk.backends()[backend]
    unfit = "" if status.available else status.reason
    return Contestant(
        f"kexue {backend}",
        lambda: partial(_ours, scan=partial(kk.selective_scan, backend=backend)),
        ours=True,
        unfit=unfit,
    )


def reference() -> Contestant:
    return Contestant("reference", lambda: partial(_ours, scan=kk.reference.selective_scan))


def loop() -> Contestant:
    """A step at a time, nothing of [batch, L, d, n] made: the reference."""
    return Contestant(LOOP, reference().load, slow=True)


def transformers() -> Contestant:
    """What MambaMixer runs where mamba-ssm is not installed, without its projections."""
    return Contestant(TRANSFORMERS, lambda: slow_path, slow=True)


def mambapy() -> Contestant:
    """A parallel scan of [batch, L, d, n] tensors."""

    def load() -> Function:
        pscan = importlib.import_module("mambapy.pscan").pscan
        return partial(_by_pscan, pscan=pscan)

    return Contestant(MAMBAPY, load, package="mambapy", slow=True)


def mamba_ssm() -> Contestant:
    """Its CUDA kernel, on [batch, d, L]; making that layout is not timed."""

    def load() -> Function:
        module = importlib.import_module("mamba_ssm.ops.selective_scan_interface")

        def call(*arguments: Tensor) -> Tensor:
            u, delta, A, B, C, D, z, delta_bias = arguments
            scan: Function = module.selective_scan_fn
            return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True)

        return call

    return Contestant(
        MAMBA_SSM,
        load,
        package="mamba_ssm",
        prepare=_channels_first,
        to_own=_turned,
        to_case=_turned,
        chain=_turned_back,
    )


def _ours(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    *,
    scan: Callable[..., Any],
) -> Tensor:
    found: Tensor = scan(u, delta, A, B, C, D, z, delta_bias, True)
    return found


def slow_path(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
) -> Tensor:
    """Decays and inputs of every step made at once, [batch, d, L, n], then a loop over L."""
    u, z = u.mT, z.mT  # [batch, d, L]
    dt = F.softplus((delta + delta_bias).mT).float()
    decay = torch.exp(A[:, None] * dt[..., None])
    source = dt[..., None] * B.float()[:, None] * u.float()[..., None]
    state = source.new_zeros(source.shape[0], *A.shape)
    ys = []
    for t in range(u.shape[2]):
        state = decay[:, :, t] * state + source[:, :, t]
        ys.append(torch.matmul(state.to(u.dtype), C[:, t, :, None])[..., 0])
    y = torch.stack(ys, dim=-1) + u * D[:, None]
    return (y * F.silu(z)).mT.to(u.dtype)


def _by_pscan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    *,
    pscan: Function,
) -> Tensor:
    """The scan in float32, as its sums are kept in place."""
    dt = F.softplus(delta.float() + delta_bias)[..., None]  # [batch, L, d, 1]
    states = pscan(torch.exp(dt * A), dt * B.float()[:, :, None] * u.float()[..., None])
    y = (states @ C.float()[..., None])[..., 0] + D * u
    return (y * F.silu(z.float())).to(u.dtype)


def _turned(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


def _channels_first(inputs: Inputs) -> tuple[Tensor, ...]:
    steps = ("u", "delta", "B", "C", "z")
    return tuple(_turned(x) if name in steps else x for name, x in inputs.items())


def _turned_back(gradients: tuple[Tensor, ...], _inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple(_turned(grad) if grad.ndim == 3 else grad for grad in gradients)
