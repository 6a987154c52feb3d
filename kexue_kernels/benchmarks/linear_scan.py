"""The cases of linear_scan, most important first."""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

from kexue_kernels.benchmarks import linear_scan_peers as peers
from kexue_kernels.benchmarks.case import Case, Contestant, Direction, Sweep
from kexue_kernels.benchmarks.goals import Goal, copy_share, faster, microseconds, scratch
from kexue_kernels.benchmarks.roof import short

Shape = tuple[int, int, int]  # B, L, D

COUNTED = {
    "forward": "bytes: a, b read, h written; FLOPs: a h + b an element",
    "backward": "bytes: a, h, grad_h read, grad_a, grad_b written; FLOPs: a db + g and db h an "
    "element, and their sum where a is time-invariant",
    "forward+backward": "the sum of forward (a, b; h) and backward (a, h, grad_h; grad_a, grad_b)",
}


def cases(device: torch.device) -> list[Case]:
    found = _gpu_cases() if device.type == "cuda" else _cpu_cases()
    return sorted(found, key=lambda case: case.priority)


def bytes_moved(a: int, b: int, itemsize: int, direction: Direction) -> int:
    """Of `a` elements of decay and `b` of input, each touched once a pass."""
    forward = a + b + b  # a, b -> h
    backward = a + b + b + a + b  # a, h, grad_h -> grad_a, grad_b
    passes = {"forward": forward, "backward": backward, "forward+backward": forward + backward}
    return itemsize * passes[direction]


def flops(a: int, b: int, is_complex: bool, direction: Direction) -> int:
    multiply, add = (6, 2) if is_complex else (1, 1)
    forward = b * (multiply + add)  # h = a h + b
    # db = a db + g, da = db h, and what sums da to a's shape
    backward = b * (multiply + add) + b * multiply + (b - a) * add
    passes = {"forward": forward, "backward": backward, "forward+backward": forward + backward}
    return passes[direction]


def result_bytes(a: int, b: int, itemsize: int, direction: Direction) -> int:
    """h, and the gradients of a and b."""
    elements = {"forward": b, "backward": a + b, "forward+backward": b + a + b}
    return itemsize * elements[direction]


def case(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    direction: Direction = "forward",
    *,
    on: Callable[..., list[Contestant]],
    time_invariant: bool = False,
    lengths: Sequence[int] = (),  # of packed sequences; B is then 1 and L their sum
    goals: tuple[Goal, ...] = (),
    priority: int = 1,
    quick: bool = False,
    sweep: str = "",  # the axis, L or D, along which this case is a point of a curve
) -> Case:
    """One linear_scan. `on` names the contestants, from L, dtype and whether it is packed."""
    _, L, D = shape
    sizes = dict(zip("BLD", shape, strict=True))
    a_shape = (D,) if time_invariant else shape
    elements = prod(a_shape), prod(shape)
    kind = f"linear_scan {direction} {short(dtype)}"
    boundaries = 8 * (len(lengths) + 1) if lengths else 0
    extras = [", a [D]"] * time_invariant + [f", {len(lengths)} packed"] * bool(lengths)

    def make(device: torch.device) -> dict[str, Tensor]:
        inputs = draw(a_shape, shape, dtype, device)
        if lengths:
            bounds = torch.tensor((0, *lengths), device=device).cumsum(0)
            inputs["cu_seqlens"] = bounds
        return inputs

    return Case(
        name=f"{kind} {_axes(shape)}{''.join(extras)}",
        op="linear_scan",
        direction=direction,
        shape=sizes,
        dtype=dtype,
        bytes=bytes_moved(*elements, dtype.itemsize, direction) + boundaries,
        flops=flops(*elements, dtype.is_complex, direction),
        counted=COUNTED[direction],
        result_bytes=result_bytes(*elements, dtype.itemsize, direction),
        output_shape=shape,
        make=make,
        reference=peers.blocked() if L > peers.LONGEST_LOOP else peers.loop(L),
        contestants=tuple(on(L, dtype, bool(lengths))),
        steps=min(L, peers.LONGEST_LOOP),
        goals=goals,
        priority=priority,
        quick=quick,
        sweep=Sweep(f"{kind} {_axes(shape, sweep)}", sweep, sizes[sweep]) if sweep else None,
    )


def _axes(shape: Shape, free: str = "") -> str:
    """[4, 2048, 512], or [4, L, 512] with L free."""
    named = zip("BLD", shape, strict=True)
    return f"[{', '.join(name if name == free else str(size) for name, size in named)}]"


def draw(
    a_shape: tuple[int, ...], b_shape: Shape, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """|a| from 0.9 to 0.999, any phase where complex; b normal."""
    generator = torch.Generator(device).manual_seed(0)
    wide = dtype if dtype.is_complex else torch.float32
    a = 0.9 + 0.099 * torch.rand(a_shape, generator=generator, device=device)
    if dtype.is_complex:
        a = torch.polar(a, 6.283 * torch.rand(a_shape, generator=generator, device=device))
    b = torch.randn(b_shape, generator=generator, dtype=wide, device=device)
    return {"a": a.to(dtype), "b": b.to(dtype)}


def on_cpu(L: int, _dtype: torch.dtype, _packed: bool) -> list[Contestant]:
    return [peers.ours("cpu"), peers.loop(L), peers.mambapy(), peers.associative_scan()]


def on_gpu(L: int, dtype: torch.dtype, packed: bool) -> list[Contestant]:
    return [
        peers.ours("triton"),
        peers.ours("cuda"),
        *peers.accelerated_scan(L, dtype),
        peers.hgrn(dtype, packed),
        peers.associative_scan(),
        peers.loop(L),
    ]


def per_call(L: int, _dtype: torch.dtype, _packed: bool) -> list[Contestant]:
    """What a user calls, the choice of a backend included."""
    return [peers.ours("auto"), peers.loop(L)]


def uneven(total: int, sequences: int) -> tuple[int, ...]:
    """Lengths of packed sequences, from short to long, that sum to `total`."""
    weight = sequences * (sequences + 1) // 2
    lengths = [total * (n + 1) // weight for n in range(sequences - 1)]
    return (*lengths, total - sum(lengths))


def _cpu_cases() -> list[Case]:
    both: Direction = "forward+backward"
    c64, bf16 = torch.complex64, torch.bfloat16
    main, lru = (4, 2048, 512), (4, 2048, 256)
    lean = scratch(4 * prod(main))
    forward_goals = (faster(peers.LOOP, 6), faster(peers.PSCAN, 4), copy_share(0.4), lean)
    both_goals = (faster(peers.PSCAN, 4), copy_share(0.4), lean)
    full = partial(case, on=on_cpu)
    quick = partial(case, on=on_cpu, quick=True)
    return [
        quick(main, goals=forward_goals, sweep="D", priority=0),
        quick(main, direction=both, goals=both_goals, priority=0),
        quick((1, 65536, 64), goals=(faster(peers.LOOP, 20),), priority=0),
        # first of all, as Python's calls are slower in a process that has compiled peers
        quick((1, 4, 8), goals=(microseconds(15),), on=per_call, priority=-1),
        quick(lru, c64, time_invariant=True),
        full(lru, c64, both, time_invariant=True),
        quick(main, bf16),
        full(main, bf16, both),
        full((1, 8192, 512), lengths=uneven(8192, 8)),
        *(
            full((4, L, 128), sweep="L", quick=L in (64, 1024, 4096), priority=2)
            for L in (64, 256, 1024, 4096, 16384, 65536)
        ),
        *(
            full((4, 2048, D), sweep="D", quick=D in (32, 128), priority=2)
            for D in (8, 32, 128, 2048)
        ),
        *(
            full((4, L, 128), direction=both, sweep="L", priority=3)
            for L in (64, 256, 1024, 4096, 16384)
        ),
    ]


def _gpu_cases() -> list[Case]:
    backward: Direction = "backward"
    both: Direction = "forward+backward"
    f32, bf16, c64 = torch.float32, torch.bfloat16, torch.complex64
    main, long = (8, 16384, 1536), (1, 1048576, 64)
    ahead = (faster(peers.WARP, 1), faster(peers.HGRN, 5))
    lean = {dtype: scratch(dtype.itemsize * prod(main)) for dtype in (f32, bf16)}
    full = partial(case, on=on_gpu)
    return [
        *(
            full(main, dtype, goals=(copy_share(0.9), *ahead, lean[dtype]), quick=True, priority=0)
            for dtype in (bf16, f32)
        ),
        *(
            full(main, dtype, backward, goals=(copy_share(0.85), *ahead, lean[dtype]), priority=0)
            for dtype in (bf16, f32)
        ),
        *(full(long, dtype, goals=(copy_share(0.7),), priority=0) for dtype in (f32, bf16)),
        *(full(main, dtype, both, goals=(*ahead, lean[dtype])) for dtype in (bf16, f32)),
        full((8, 16384, 768), c64, time_invariant=True),
        full((8, 16384, 768), c64, both, time_invariant=True),
        full((1, 131072, 1536), bf16, lengths=uneven(131072, 32)),
        *(
            full((8, L, 512), bf16, sweep="L", quick=L in (1024, 16384), priority=2)
            for L in (64, 256, 1024, 4096, 16384, 65536)
        ),
        *(full((8, 8192, D), bf16, sweep="D", priority=2) for D in (16, 64, 256, 1024, 4096)),
        *(full((8, L, 512), bf16, both, sweep="L", priority=3) for L in (256, 1024, 4096, 16384)),
    ]
