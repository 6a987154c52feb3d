"""The cases of selective_scan, most important first."""

from math import prod

import torch
from torch import Tensor

from kexue_kernels.benchmarks import selective_scan_peers as peers
from kexue_kernels.benchmarks.case import Case, Contestant, Direction, Sweep
from kexue_kernels.benchmarks.goals import Goal, elements_per_second, faster, leaner
from kexue_kernels.benchmarks.roof import short

Shape = tuple[int, int, int, int]  # batch, L, d, n
AXES = ("batch", "L", "d", "n")

COUNTED = {
    "forward": "bytes: u, delta, z, B, C read, out written; FLOPs: dt A, a x + dt B u, C x (6 an "
    "element and state) and some 12 an element, with one exponential an element and state",
    "backward": "bytes: u, delta, z, B, C, grad_out read, their gradients written; FLOPs: 20 an "
    "element and state, with one exponential an element and state",
    "forward+backward": "the sum of forward and backward",
}


def cases(device: torch.device) -> list[Case]:
    return _gpu_cases() if device.type == "cuda" else _cpu_cases()


def bytes_moved(shape: Shape, itemsize: int, direction: Direction) -> int:
    """Each tensor touched once a pass; parameters and states are too small to count."""
    batch, L, d, n = shape
    element, matrix = batch * L * d, batch * L * n
    forward = 4 * element + 2 * matrix  # u, delta, z -> out
    backward = 7 * element + 4 * matrix  # u, delta, z, grad_out -> three gradients
    passes = {"forward": forward, "backward": backward, "forward+backward": forward + backward}
    return itemsize * passes[direction]


def flops(shape: Shape, direction: Direction) -> int:
    elements, states = prod(shape[:3]), prod(shape)
    forward, backward = 6 * states + 12 * elements, 20 * states + 30 * elements
    passes = {"forward": forward, "backward": backward, "forward+backward": forward + backward}
    return passes[direction]


def result_bytes(shape: Shape, itemsize: int, direction: Direction) -> int:
    """out, and the gradients of u, delta, z, B and C."""
    batch, L, d, n = shape
    element, matrix = batch * L * d, batch * L * n
    gradients = 3 * element + 2 * matrix
    elements = {
        "forward": element,
        "backward": gradients,
        "forward+backward": element + gradients,
    }
    return itemsize * elements[direction]


def case(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    direction: Direction = "forward",
    *,
    on: list[Contestant],
    goals: tuple[Goal, ...] = (),
    priority: int = 1,
    quick: bool = False,
    sweep: str = "",  # L or d, along which this case is a point of a curve
) -> Case:
    """One selective_scan with D, z, delta_bias and softplus, as a Mamba layer calls it."""
    sizes = dict(zip(AXES, shape, strict=True))
    kind = f"selective_scan {direction} {short(dtype)}"
    return Case(
        name=f"{kind} {_axes(shape)}",
        op="selective_scan",
        direction=direction,
        shape=sizes,
        dtype=dtype,
        bytes=bytes_moved(shape, dtype.itemsize, direction),
        flops=flops(shape, direction),
        counted=COUNTED[direction],
        result_bytes=result_bytes(shape, dtype.itemsize, direction),
        output_shape=shape[:3],
        make=lambda device: draw(shape, dtype, device),
        reference=peers.reference(),
        contestants=tuple(on),
        steps=shape[1] * 8,  # a step is some eight calls
        goals=goals,
        priority=priority,
        quick=quick,
        sweep=Sweep(f"{kind} {_axes(shape, sweep)}", sweep, sizes[sweep]) if sweep else None,
    )


def _axes(shape: Shape, free: str = "") -> str:
    """[1, 2048, 1536] n = 16, or [1, L, 1536] with L free."""
    named = list(zip(AXES, shape, strict=True))
    sizes = ", ".join(name if name == free else str(size) for name, size in named[:3])
    return f"[{sizes}] n = {'n' if free == 'n' else shape[3]}"


def draw(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """As a Mamba layer starts: A = -(1 .. n), steps from 0.001 to 0.1."""
    batch, L, d, n = shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    dt = torch.exp(torch.rand(d, generator=generator, device=device) * 4.6 - 6.9)
    return {
        "u": normal(batch, L, d).to(dtype),
        "delta": (0.1 * normal(batch, L, d)).to(dtype),
        "A": -torch.arange(1.0, n + 1, device=device).repeat(d, 1),
        "B": normal(batch, L, n).to(dtype),
        "C": normal(batch, L, n).to(dtype),
        "D": torch.ones(d, device=device),
        "z": normal(batch, L, d).to(dtype),
        "delta_bias": dt + torch.log(-torch.expm1(-dt)),  # softplus gives dt
    }


def _cpu_cases() -> list[Case]:
    on = [peers.ours("cpu"), peers.transformers(), peers.mambapy(), peers.loop()]
    # The gradient of the slow path fills a [B, d, L, n] tensor for every step: minutes a call.
    trained = [peers.ours("cpu"), peers.mambapy(), peers.loop()]
    both: Direction = "forward+backward"
    main = (1, 2048, 1536, 16)
    forward_goals = (faster(peers.TRANSFORMERS, 15), faster(peers.MAMBAPY, 20))
    return [
        case(main, on=on, goals=forward_goals, quick=True, priority=0),
        case(main, direction=both, on=trained, goals=(faster(peers.MAMBAPY, 12),), priority=0),
        case(main, torch.bfloat16, on=on),
        case((1, 16384, 16, 16), on=on),
        case((64, 32, 256, 16), on=on, quick=True),
        *(
            case((1, L, 512, 16), on=on, sweep="L", quick=L in (64, 512), priority=2)
            for L in (64, 256, 512, 2048, 8192)
        ),
        *(
            case((1, L, 512, 16), direction=both, on=trained, sweep="L", priority=3)
            for L in (64, 256, 512, 2048)
        ),
    ]


def _gpu_cases() -> list[Case]:
    on = [peers.ours("triton"), peers.ours("cuda"), peers.mamba_ssm(), peers.loop()]
    backward: Direction = "backward"
    both: Direction = "forward+backward"
    bf16 = torch.bfloat16
    main = (8, 2048, 2048, 16)
    rate = elements_per_second(prod(main[:3]), 2.0e11)
    return [
        case(main, bf16, on=on, goals=(faster(peers.MAMBA_SSM, 1.3), rate), quick=True, priority=0),
        case(main, bf16, backward, on=on, goals=(faster(peers.MAMBA_SSM, 1.5),), priority=0),
        case(main, bf16, both, on=on, goals=(leaner(peers.MAMBA_SSM, 1.1),), priority=0),
        case((1, 65536, 256, 16), bf16, on=on, goals=(faster(peers.MAMBA_SSM, 5),), priority=0),
        case((4096, 16, 256, 16), bf16, on=on, goals=(faster(peers.MAMBA_SSM, 2),), priority=0),
        case(main, on=on),
        case(main, direction=both, on=on),
        *(
            case((8, L, 1024, 16), bf16, on=on, sweep="L", quick=L == 1024, priority=2)
            for L in (64, 256, 1024, 4096, 16384)
        ),
        *(
            case((8, L, 1024, 16), bf16, both, on=on, sweep="L", priority=3)
            for L in (256, 1024, 4096)
        ),
    ]
