"""The cases of a training step with a quantiser: search, quantise, loss, backward, codebook."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import kexue_kernels as kk
from kexue_kernels.benchmarks import vq_peers as peers
from kexue_kernels.benchmarks import vq_truth
from kexue_kernels.benchmarks.case import Case, Contestant, Inputs
from kexue_kernels.benchmarks.goals import Goal, faster, leaner, no_rows_wrong
from kexue_kernels.benchmarks.roof import short

Shape = tuple[int, int, int]  # N, K, d
Build = Callable[[Any], Any]
Parts = tuple[Tensor, Tensor, Tensor, Tensor]  # quantized, gradient of x, codebook, loss
EPS = 1e-5  # of Laplace smoothing

COUNTED = (
    "bytes: search (x, codebook; indices), quantise (x, codes; quantized), backward (gradient, x, "
    "codes; gradient of x), statistics (x; counts, sums), update (sums, running sums; running "
    "sums, codebook), each tensor once a pass; FLOPs: the search's products; rows wrong: of "
    "quantized, the gradient of x and the codebook after the step"
)


def cases(device: torch.device) -> list[Case]:
    backend, times = ("triton", 5.0) if device.type == "cuda" else ("cpu", 1.5)
    goals = (faster(peers.THEIRS, times), leaner(peers.THEIRS, 0.1), no_rows_wrong())
    step = partial(case, backend=backend)
    return [
        step((32768, 8192, 256), goals=goals, priority=0 if device.type == "cuda" else 1),
        step((2048, 512, 64), quick=True, priority=2),
    ]


def case(
    shape: Shape,
    *,
    backend: str,
    goals: tuple[Goal, ...] = (),
    priority: int = 1,
    quick: bool = False,
) -> Case:
    """One step on N normal rows with K normal codes, straight through, in float32."""
    N, K, d = shape
    dtype = torch.float32
    passes = N * d * (1 + 3 + 4 + 1) + K * d * (1 + 1 + 4)
    return Case(
        name=f"vector_quantize training step {short(dtype)} [{N}, {d}] K = {K}",
        op="vector_quantize",
        direction="forward",  # the backward is part of what is called
        shape=dict(zip("NKd", shape, strict=True)),
        dtype=dtype,
        bytes=dtype.itemsize * passes + 4 * 8 * N,
        flops=2 * N * K * d,
        counted=COUNTED,
        result_bytes=dtype.itemsize * 2 * N * d + 8 * N,
        output_shape=(2 * N + K + 1, d),
        make=lambda device: draw(shape, device),
        reference=Contestant("torch, in full", lambda: in_full),
        contestants=(ours(backend), theirs()),
        goals=goals,
        priority=priority,
        quick=quick,
        gate=vq_truth.Gate(),
    )


def draw(shape: Shape, device: torch.device) -> dict[str, Tensor]:
    """x [N, d], codebook [K, d], and the gradient [N, d] that comes back to quantized."""
    N, K, d = shape
    generator = torch.Generator(device).manual_seed(0)
    names = {"x": N, "codebook": K, "gradient": N}
    return {
        name: torch.randn(n, d, generator=generator, device=device) for name, n in names.items()
    }


def ours(backend: str) -> Contestant:
    def build(codebook: Tensor) -> kk.nn.VectorQuantizer:
        return peers.own(codebook, backend)

    unfit = peers.absent(backend)
    return _contestant(f"kexue {backend}", build, lambda m: m.codes, ours=True, unfit=unfit)


def theirs() -> Contestant:
    package = peers.PACKAGE
    return _contestant(
        peers.THEIRS, peers.theirs, lambda m: m.codebook, package=package, approximate=True
    )


def _contestant(name: str, build: Build, codes_of: Build, **options: Any) -> Contestant:
    """The step of a module. Each call moves its codebook on: the first one is checked."""

    def prepare(inputs: Inputs) -> tuple[Any, ...]:
        return build(inputs["codebook"]).train(), inputs["x"], inputs["gradient"]

    def step(module: Any, x: Tensor, gradient: Tensor) -> Parts:
        x = x.detach().requires_grad_()
        quantized, _, loss = module(x)
        torch.autograd.backward([quantized, loss.sum()], [gradient, None])
        assert x.grad is not None
        return quantized.detach(), x.grad, codes_of(module), loss.detach()

    return Contestant(name, lambda: step, prepare=prepare, to_case=together, **options)


def in_full(x: Tensor, codebook: Tensor, gradient: Tensor) -> Tensor:
    """The step in plain PyTorch, in x's dtype, but for the search."""
    indices = vq_truth.nearest(x, codebook)
    K, d = codebook.shape
    x = x.detach().requires_grad_()
    codes = codebook[indices]
    loss = F.mse_loss(x, codes)
    torch.autograd.backward([x + (codes - x).detach(), loss], [gradient, None])
    assert x.grad is not None
    counts = torch.bincount(indices, minlength=K).to(x.dtype)
    sums = x.new_zeros(K, d).index_add_(0, indices, x.detach())
    size = peers.DECAY * torch.ones_like(counts) + (1 - peers.DECAY) * counts
    total = peers.DECAY * codebook + (1 - peers.DECAY) * sums
    smoothed = (size + EPS) / (size.sum() + K * EPS) * size.sum()
    return together((codes, x.grad, total / smoothed[:, None], loss.detach()))


def together(parts: Any) -> Tensor:
    """What a step made, [2 N + K + 1, d]: quantized, the gradient of x, codebook, loss."""
    quantized, grad, codebook, loss = parts
    return torch.cat([quantized, grad, codebook, loss.reshape(1, 1).expand(1, grad.shape[1])])
