"""The cases of monarch_matmul and, at their end, block_diag_matmul's; most important first."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from kexue_kernels.benchmarks import block_diag_matmul
from kexue_kernels.benchmarks import monarch_peers as peers
from kexue_kernels.benchmarks.case import Case, Direction, Sweep
from kexue_kernels.benchmarks.goals import Goal, faster
from kexue_kernels.benchmarks.results import CaseResult, Measurement
from kexue_kernels.benchmarks.roof import short
from kexue_kernels.monarch.plan import Shape, cluster

COUNTED = {
    "forward": "bytes: x, w1, w2 read, y written; FLOPs: a product and a sum for each row and "
    "weight",
    "backward": "bytes: x, w1, w2, grad_y read, grad_x, grad_w1, grad_w2 written; FLOPs: twice "
    "the forward's (making z again is not counted)",
}
COUNTED["forward+backward"] = "the sum of forward and backward. Backward, " + COUNTED["backward"]


def cases(device: torch.device) -> list[Case]:
    found = _gpu_cases() if device.type == "cuda" else _cpu_cases()
    found += block_diag_matmul.cases(device)
    return sorted(found, key=lambda case: case.priority)


def bytes_moved(rows: int, weights: int, itemsize: int, direction: Direction) -> int:
    """`rows` elements of x and as many of y, and `weights`, each touched once a pass."""
    forward = 2 * rows + weights  # x, w -> y
    backward = 3 * rows + 2 * weights  # x, grad_y, w -> grad_x, grad_w
    passes = {"forward": forward, "backward": backward, "forward+backward": forward + backward}
    return itemsize * passes[direction]


def flops(N: int, weights: int, is_complex: bool, direction: Direction) -> int:
    passes = {"forward": 1, "backward": 2, "forward+backward": 3}[direction]
    return passes * N * weights * (8 if is_complex else 2)


def result_bytes(rows: int, weights: int, itemsize: int, direction: Direction) -> int:
    """y, and the gradients of x and the factors."""
    y, grads = rows, rows + weights
    elements = {"forward": y, "backward": grads, "forward+backward": y + grads}
    return itemsize * elements[direction]


def case(
    n: int,
    blocks: int,
    rows: int,
    dtype: torch.dtype = torch.float32,
    direction: Direction = "forward",
    *,
    on: peers.On,
    device: torch.device,
    goals: Sequence[Goal] = (),
    priority: int = 1,
    quick: bool = False,
    sweep: str = "",  # the axis, n, k or N, along which this case is a point of a curve
) -> Case:
    """One monarch_matmul of width n, both factors of `blocks` blocks."""
    sizes = {"n": n, "k": blocks, "N": rows}
    weights = 2 * n * (n // blocks)
    kind = f"monarch_matmul {direction} {short(dtype)}"
    words = {"n": f"n = {n}", "k": f"{blocks} blocks", "N": f"{rows} rows"}
    free = "k" if sweep == "n" else ""  # as many as a block is wide, then
    title = ", ".join(word for name, word in words.items() if name not in (sweep, free))
    contestants = on(dtype.itemsize * n * n, device)
    if device.type == "cuda" and direction == "forward" and on_hopper(n, blocks, rows, dtype):
        contestants = [peers.ours("cuda"), *contestants]
    return Case(
        name=f"{kind} {', '.join(words.values())}",
        op="monarch_matmul",
        direction=direction,
        shape=sizes,
        dtype=dtype,
        bytes=bytes_moved(rows * n, weights, dtype.itemsize, direction),
        flops=flops(rows, weights, dtype.is_complex, direction),
        counted=COUNTED[direction],
        result_bytes=result_bytes(rows * n, weights, dtype.itemsize, direction),
        output_shape=(rows, n),
        make=lambda device: draw(n, blocks, rows, dtype, device),
        reference=peers.reference(),
        contestants=tuple(contestants),
        goals=tuple(goals),
        priority=priority,
        quick=quick,
        sweep=Sweep(f"{kind} {title}", sweep, sizes[sweep]) if sweep else None,
    )


def on_hopper(n: int, blocks: int, rows: int, dtype: torch.dtype) -> bool:
    """Whether the kernel for clusters takes part."""
    each = n // blocks
    return cluster(Shape(rows, blocks, each, each, blocks, each, each, dtype)) is not None


def draw(
    n: int, blocks: int, rows: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """All normal, the factors so that what goes through them keeps its variance."""
    generator = torch.Generator(device).manual_seed(0)
    wide = dtype if dtype.is_complex else torch.float32
    each = n // blocks

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=wide, device=device)

    scale = each**-0.5
    inputs = {
        "x": normal(rows, n),
        "w1": scale * normal(blocks, each, each),
        "w2": scale * normal(blocks, each, each),
    }
    return {name: x.to(dtype) for name, x in inputs.items()}


def nanoseconds_a_row(rows: int, most: float) -> Goal:
    def measure(_: CaseResult, best: Measurement) -> float | None:
        return None if best.seconds is None else best.seconds / rows * 1e9

    return Goal(f"at most {most:g} ns a row", measure, most, at_least=False)


def _cpu_cases() -> list[Case]:
    f32, bf16, c64 = torch.float32, torch.bfloat16, torch.complex64
    both: Direction = "forward+backward"
    on = partial(case, on=peers.on_cpu, device=torch.device("cpu"))
    theirs = faster(peers.STRUCTURED, 1.3)
    trains = (theirs, faster(peers.BMM, 1.6))
    main = partial(on, rows=1024, priority=0)
    narrow = main(1024, 32, goals=(theirs, faster(peers.DENSE, 3.5)), quick=True, sweep="n")
    return [
        narrow,
        main(4096, 64, goals=(theirs, faster(peers.DENSE, 18)), sweep="n"),
        main(1024, 32, dtype=f32, direction=both, goals=trains, quick=True),
        main(4096, 64, dtype=f32, direction=both, goals=trains),
        *(on(1024, 32, 1024, dtype) for dtype in (bf16, c64)),
        *(on(4096, 64, rows, sweep="N", priority=2) for rows in (1, 8, 64, 512)),
        *(on(4096, blocks, 256, sweep="k", priority=2) for blocks in (4, 16, 64, 256)),
        on(256, 16, 1024, sweep="n", quick=True, priority=2),
        on(16384, 128, 1024, sweep="n", priority=3),
    ]


def _gpu_cases() -> list[Case]:
    f32, bf16 = torch.float32, torch.bfloat16
    both: Direction = "forward+backward"
    on = partial(case, on=peers.on_gpu, device=torch.device("cuda"))
    # n, blocks, rows; ns a row, times dense, times two bmm's
    main = [
        (1024, 32, 65536, 1.4, 1.9, 2.7),
        (4096, 64, 65536, 6.0, 7.0, 2.5),
        (16384, 128, 16384, 30.0, 22.0, 2.0),
    ]
    found = []
    for n, blocks, rows, most, dense, bmm in main:
        ahead = (faster(peers.DENSE, dense), faster(peers.BMM, bmm))
        goals = (nanoseconds_a_row(rows, most), *ahead)
        found += [
            on(n, blocks, rows, bf16, goals=goals, quick=n < 4096, priority=0),
            on(n, blocks, rows, bf16, both, goals=(faster(peers.BMM, 1.6),), priority=0),
            on(n, blocks, rows, f32, goals=(faster(peers.BMM, 1),)),
        ]
    return [
        *found,
        *(on(4096, 64, rows, bf16, sweep="N", priority=2) for rows in (1, 16, 256, 4096)),
        *(on(4096, blocks, 8192, bf16, sweep="k", priority=2) for blocks in (4, 16, 64, 256)),
        *(
            on(n, blocks, 16384, bf16, sweep="n", quick=n == 256, priority=2)
            for n, blocks in ((256, 16), (1024, 32), (4096, 64), (8192, 64))
        ),
    ]
