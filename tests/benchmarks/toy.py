"""A family small enough to run a whole benchmark of: y = a * b."""

from collections.abc import Callable

import torch
from torch import Tensor

from kexue_kernels.benchmarks.case import Case, Contestant, Direction, Sweep
from kexue_kernels.benchmarks.goals import Goal, faster

CPU = torch.device("cpu")


def product(a: Tensor, b: Tensor) -> Tensor:
    return a * b


def off_by_a_hair(a: Tensor, b: Tensor) -> Tensor:
    return a * b * (1 + 1e-4)


def refuses(_a: Tensor, _b: Tensor) -> Tensor:
    raise RuntimeError("no such kernel\nand a long trace")


def contestant(
    name: str, function: Callable[..., Tensor] = product, **options: object
) -> Contestant:
    return Contestant(name, lambda: function, **options)  # type: ignore[arg-type]


OURS = contestant("ours", ours=True)
PEER = contestant("peer")
WRONG = contestant("wrong peer", off_by_a_hair)
RAISING = contestant("raising peer", refuses)
MISSING = contestant("missing peer", package="no_such_package_anywhere")
UNFIT = contestant("unfit peer", unfit="takes even lengths")
SLOW = contestant("slow peer", slow=True)
EVERY = (OURS, PEER, WRONG, RAISING, MISSING, UNFIT, SLOW)


def case(
    size: int = 64,
    direction: Direction = "forward",
    contestants: tuple[Contestant, ...] = EVERY,
    goals: tuple[Goal, ...] = (faster("peer", 1e-6), faster("peer", 1e6), faster("wrong peer", 1)),
    reference: Contestant = PEER,
) -> Case:
    def make(device: torch.device) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        a, b = torch.randn(2, size, size, generator=generator, device=device)
        return {"a": a, "b": b}

    return Case(
        name=f"product {direction} {size}",
        op="product",
        direction=direction,
        shape={"L": size},
        dtype=torch.float32,
        bytes=12 * size**2,
        flops=size**2,
        counted="a, b read, y written; a product an element",
        result_bytes=4 * size**2,
        output_shape=(size, size),
        make=make,
        reference=reference,
        contestants=contestants,
        goals=goals,
        quick=True,
        sweep=Sweep(f"product {direction}", "L", size),
    )
