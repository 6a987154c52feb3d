"""The cases of nearest_codebook, most important first."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from kexue_kernels.benchmarks import vq_peers as peers
from kexue_kernels.benchmarks import vq_truth
from kexue_kernels.benchmarks.case import Case, Contestant, Sweep
from kexue_kernels.benchmarks.goals import (
    Goal,
    beside,
    copy_share,
    faster,
    matrix_share,
    megabytes,
    no_rows_wrong,
    of,
)
from kexue_kernels.benchmarks.roof import short

Shape = tuple[int, int, int]  # N, K, d
On = Callable[[Shape, torch.dtype], Sequence[Contestant]]

COUNTED = (
    "bytes: x, codebook read, indices written; FLOPs: a product and a sum for each row, code and "
    "channel; rows wrong: the share that differs from the argmin in double precision"
)


def cases(device: torch.device) -> list[Case]:
    found = _gpu_cases() if device.type == "cuda" else _cpu_cases()
    return sorted(found, key=lambda case: case.priority)


def case(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    *,
    on: On,
    goals: tuple[Goal, ...] = (),
    priority: int = 1,
    quick: bool = False,
    sweep: str = "",  # the axis, N or K, along which this case is a point of a curve
) -> Case:
    """One search: N rows and K codes of d channels, all normal."""
    N, K, d = shape
    sizes = dict(zip("NKd", shape, strict=True))
    kind = f"nearest_codebook {short(dtype)}"
    title = ", ".join(f"{name} = {size}" for name, size in sizes.items() if name != sweep)
    return Case(
        name=f"{kind} [{N}, {d}] K = {K}",
        op="nearest_codebook",
        direction="forward",
        shape=sizes,
        dtype=dtype,
        bytes=(N + K) * d * dtype.itemsize + 8 * N,
        flops=2 * N * K * d,
        counted=COUNTED,
        result_bytes=8 * N,
        output_shape=(N,),
        make=lambda device: draw(shape, dtype, device),
        reference=vq_truth.reference(),
        contestants=tuple(on(shape, dtype)),
        goals=goals,
        priority=priority,
        quick=quick,
        sweep=Sweep(f"{kind} {title}", sweep, sizes[sweep]) if sweep else None,
        gate=vq_truth.Gate(),
    )


def draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    N, K, d = shape
    generator = torch.Generator(device).manual_seed(0)
    x, codebook = (torch.randn(n, d, generator=generator, device=device) for n in (N, K))
    return {"x": x.to(dtype), "codebook": codebook.to(dtype)}


def on_cpu(shape: Shape, dtype: torch.dtype) -> list[Contestant]:
    return [
        peers.ours("cpu", "exact"),
        peers.faiss(dtype),
        peers.cdist(shape, torch.device("cpu")),
        peers.product(),
        peers.flash_kmeans(shape, torch.device("cpu")),
        peers.fastkmeans(dtype, torch.device("cpu")),
        peers.vector_quantize_pytorch(shape, torch.device("cpu")),
    ]


def on_cpu_lean(shape: Shape, _dtype: torch.dtype) -> list[Contestant]:
    """For a search that takes long: ours, and who would need all of the matrix."""
    return [peers.ours("cpu", "exact"), peers.cdist(shape, torch.device("cpu"))]


def on_gpu(shape: Shape, dtype: torch.dtype) -> list[Contestant]:
    return [
        peers.ours("triton", "fast"),
        peers.ours("triton", "exact"),
        peers.flash_kmeans(shape, torch.device("cuda")),
        peers.fastkmeans(dtype, torch.device("cuda")),
        peers.product(),
        peers.cdist(shape, torch.device("cuda")),
        peers.vector_quantize_pytorch(shape, torch.device("cuda")),
    ]


def _cpu_cases() -> list[Case]:
    on = partial(case, on=on_cpu)
    search = (faster(peers.FAISS, 1), faster(peers.CDIST, 1.5), no_rows_wrong())
    return [
        on((16384, 8192, 256), goals=search, priority=0),
        case((65536, 65536, 16), on=on_cpu_lean, goals=(megabytes(64),)),
        on((1, 262144, 256)),
        on((8, 262144, 256)),
        on((16384, 8192, 256), torch.bfloat16, priority=2),
        *(on((4096, K, 64), sweep="K", quick=K == 1024, priority=2) for K in (256, 1024, 4096)),
        on((4096, 16384, 64), sweep="K", priority=3),
    ]


def _gpu_cases() -> list[Case]:
    f32, bf16 = torch.float32, torch.bfloat16
    on = partial(case, on=on_gpu)
    main = (65536, 8192, 256)
    ahead = of("fast", matrix_share(0.7), faster(peers.FLASH_KMEANS, 1))
    exact = of("exact", no_rows_wrong(), beside("fast", 1.3))
    single = of("exact", no_rows_wrong(), faster(peers.CDIST, 8), faster(peers.PRODUCT, 2))
    return [
        on(main, bf16, goals=(*ahead, *exact), quick=True, priority=0),
        on(main, f32, goals=single, quick=True, priority=0),
        on((2**20, 1024, 64), bf16, goals=(matrix_share(0.5),), priority=0),
        *(on((256, 262144, 256), dtype, goals=(copy_share(0.75),)) for dtype in (f32, bf16)),
        on((65536, 65536, 256), goals=of("exact", megabytes(64))),
        *(on((65536, K, 64), bf16, sweep="K", priority=2) for K in (256, 1024, 4096, 16384)),
    ]
