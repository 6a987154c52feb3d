"""What `selfcheck` runs: one module per family, named as the family, with its `CASES`."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One call of one op.

    `make` gives seeded inputs by name, on CPU. `call` runs the op on them (on any device, in
    any dtype) with a backend; what it returns is compared, and so are the gradients of its
    floating outputs in those of its inputs that `differentiable` names. `interpreted` is False
    where Triton's interpreter, at about a millisecond an element, would take too long. `kernels`
    names the op whose kernels serve this one, where that is another.
    """

    op: str
    name: str
    make: Callable[[], dict[str, Tensor]]
    call: Callable[[Tensors, str], dict[str, Tensor]]
    differentiable: tuple[str, ...] = ()
    interpreted: bool = True
    kernels: str = ""


def cases(family: str) -> list[Case]:
    found: list[Case] = importlib.import_module(f"{__name__}.{family}").CASES
    return found


def draw(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers; the same for every dtype of a kind, up to rounding."""
    wide = torch.complex64 if dtype.is_complex else torch.float32
    return torch.randn(shape, generator=generator, dtype=wide).to(dtype)
