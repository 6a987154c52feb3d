"""The cases of block_diag_matmul: one factor alone, against a batched product with its copies."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

import kexue_kernels as kk
from kexue_kernels.benchmarks.case import Case, Contestant, Direction
from kexue_kernels.benchmarks.goals import Goal, faster
from kexue_kernels.benchmarks.roof import short

BMM = "torch bmm"
EINSUM = "torch einsum"
COMPILED = "torch.compile of the einsum"
COUNTED = (
    "bytes: x and w read, y written; backward: x, grad_y and w read, grad_x and grad_w written; "
    "FLOPs: a product and a sum for each row and weight, backward twice that"
)


def cases(device: torch.device) -> list[Case]:
    both: Direction = "forward+backward"
    ahead = (faster(BMM, 1),)
    if device.type == "cuda":
        on = partial(case, backend="triton", dtype=torch.bfloat16)
        return [
            on((4096, 64, 65536), goals=ahead),
            on((4096, 64, 65536), direction=both, goals=ahead, priority=2),
        ]
    on = partial(case, backend="cpu")
    return [
        on((4096, 64, 1024), goals=ahead),
        on((4096, 64, 1024), direction=both, goals=ahead),
    ]


def case(
    shape: tuple[int, int, int],
    *,
    backend: str,
    dtype: torch.dtype = torch.float32,
    direction: Direction = "forward",
    goals: Sequence[Goal] = (),
    priority: int = 1,
) -> Case:
    """Width n in and out, k square blocks, N rows."""
    n, k, N = shape
    x, weights = N * n, n * (n // k)
    forward, backward = 2 * x + weights, 3 * x + 2 * weights
    trains = direction == "forward+backward"
    return Case(
        name=f"block_diag_matmul {direction} {short(dtype)} n = {n}, {k} blocks, {N} rows",
        op="block_diag_matmul",
        direction=direction,
        shape={"n": n, "k": k, "N": N},
        dtype=dtype,
        bytes=dtype.itemsize * (forward + backward * trains),
        flops=2 * N * weights * (3 if trains else 1),
        counted=COUNTED,
        result_bytes=dtype.itemsize * (x + (x + weights) * trains),
        output_shape=(N, n),
        make=lambda device: draw(shape, dtype, device),
        reference=Contestant(EINSUM, lambda: kk.reference.block_diag_matmul),
        contestants=(
            ours(backend),
            Contestant(BMM, lambda: by_bmm),
            Contestant(EINSUM, lambda: by_einsum),
            Contestant(COMPILED, lambda: torch.compile(by_einsum), slow=True),
        ),
        goals=tuple(goals),
        priority=priority,
    )


def draw(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """x [N, n] normal, and w [k, n/k, n/k] so that y keeps its variance."""
    n, k, N = shape
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(N, n, generator=generator, device=device)
    w = torch.randn(k, n // k, n // k, generator=generator, device=device) * (n // k) ** -0.5
    return {"x": x.to(dtype), "w": w.to(dtype)}


def ours(backend: str) -> Contestant:
    status = kk.backends()[backend]
    return Contestant(
        f"kexue {backend}",
        lambda: partial(kk.block_diag_matmul, backend=backend),
        ours=True,
        unfit="" if status.available else status.reason,
    )


def by_bmm(x: Tensor, w: Tensor) -> Tensor:
    """x [N, k*p], w [k, q, p] -> [N, k*q]: blocks outermost for the product, and back."""
    k, q, p = w.shape
    blocks = x.view(-1, k, p).transpose(0, 1)  # k N p
    return torch.bmm(blocks, w.mT).transpose(0, 1).reshape(-1, k * q)


def by_einsum(x: Tensor, w: Tensor) -> Tensor:
    k, q, p = w.shape
    return torch.einsum("nkp,kqp->nkq", x.view(-1, k, p), w).reshape(-1, k * q)
