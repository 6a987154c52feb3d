"""What is measured: a case, and the contestants that compute it."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from kexue_kernels.benchmarks.goals import Goal
from kexue_kernels.benchmarks.results import Status

Direction = Literal["forward", "backward", "forward+backward"]
Inputs = Mapping[str, Tensor]
Function = Callable[..., Any]  # gives a Tensor, but for what `Contestant.to_case` joins


def same(x: Tensor) -> Tensor:
    return x


def as_given(inputs: Inputs) -> tuple[Tensor, ...]:
    return tuple(inputs.values())


def no_chain(gradients: tuple[Tensor, ...], _inputs: Inputs) -> tuple[Tensor, ...]:
    return gradients


@dataclass(frozen=True)
class Contestant:
    """One way to compute a case's output. Only the function that `load` returns is timed.

    `prepare` turns the case's inputs into that function's arguments, the differentiable ones
    first and in the case's order; all are tensors where the case has a backward. `to_own` takes
    a tensor of the output's shape into the contestant's layout, `to_case` takes it back (or joins
    what else the function gave), and `chain` turns the gradients of what `prepare` made into
    those of the case's inputs (expanded or not).
    """

    name: str
    load: Callable[[], Function]
    ours: bool = False
    package: str = ""  # importable name of the package it comes from
    unfit: str = ""  # why it can't take this case; empty where it can
    slow: bool = False  # sits out quick runs
    approximate: bool = False  # timed though it may miss the gate: by how much is shown
    prepare: Callable[[Inputs], tuple[Any, ...]] = as_given
    to_own: Callable[[Tensor], Tensor] = same
    to_case: Callable[[Any], Tensor] = same
    chain: Callable[[tuple[Tensor, ...], Inputs], tuple[Tensor, ...]] = no_chain

    def absence(self) -> tuple[Status, str] | None:
        """Why it takes no part, if it takes none."""
        if self.unfit:
            return "left out", self.unfit
        if self.package and importlib.util.find_spec(self.package) is None:
            return "not installed", f"{self.package} is not installed"
        return None


class Sweep(NamedTuple):
    """Cases of one title make one curve: the case's place on the axis is `value`.

    Curves show bytes or FLOPs a second, or, where it is named, what a call makes `per_call` of.
    """

    title: str
    axis: str
    value: int
    made: str = ""
    per_call: int = 1


class Gate(Protocol):
    """What is right: `kexue_kernels.benchmarks.check`, but where a case has its own."""

    def expect(self, case: "Case", inputs: Inputs, grad: Tensor) -> Any:
        """The right results, in whatever form `judge` takes them."""

    def judge(
        self, found: dict[str, Tensor], expected: Any
    ) -> tuple[dict[str, dict[str, float | None]], str]:
        """Each result's error and limit, and what is wrong (empty if nothing is)."""


@dataclass(frozen=True, eq=False)
class Case:
    name: str
    op: str
    direction: Direction
    shape: Mapping[str, int]
    dtype: torch.dtype
    bytes: int  # read and written by an implementation that touches each element once
    flops: int
    counted: str  # how bytes and flops were counted, in words
    result_bytes: int  # outputs and gradients: the memory that no implementation can spare
    output_shape: tuple[int, ...]
    make: Callable[[torch.device], dict[str, Tensor]]  # seeded; the differentiable ones first
    reference: Contestant  # plain PyTorch, serves float64 and complex128 too
    contestants: tuple[Contestant, ...]
    steps: int = 1  # Python-level steps of the reference, for estimates of time
    goals: tuple[Goal, ...] = ()
    priority: int = 1  # smaller runs earlier
    quick: bool = False
    sweep: Sweep | None = None
    gate: Gate | None = None  # the check before the clock, where it is not the usual one

    @property
    def matrix_dtype(self) -> torch.dtype:
        """The dtype whose matrix rate bounds the arithmetic."""
        half = self.dtype in (torch.bfloat16, torch.float16)
        return torch.bfloat16 if half else torch.float32

    def cotangent(self, device: torch.device) -> Tensor:
        """A gradient of the output."""
        generator = torch.Generator(device).manual_seed(1)
        wide = self.dtype if self.dtype.is_complex else torch.float32
        grad = torch.randn(self.output_shape, generator=generator, dtype=wide, device=device)
        return grad.to(self.dtype)


class Bound:
    """A contestant with a case's inputs in its own layout, ready to be called and timed."""

    def __init__(
        self, contestant: Contestant, direction: Direction, inputs: Inputs, grad: Tensor
    ) -> None:
        self.contestant, self.direction, self.inputs = contestant, direction, inputs
        self._function = contestant.load()
        self._arguments = contestant.prepare(inputs)
        self._leaves: tuple[Tensor, ...] = ()
        if direction != "forward":
            self._arguments = tuple(
                x.detach().requires_grad_() if differentiable(x) else x for x in self._arguments
            )
            self._leaves = tuple(x for x in self._arguments if x.requires_grad)
            self._grad = contestant.to_own(grad)
        if direction == "backward":
            self._output = self._forward()
        self.call: Callable[[], object] = {
            "forward": self._forward,
            "backward": self._backward,
            "forward+backward": self._both,
        }[direction]

    def results(self) -> dict[str, Tensor]:
        """The output, and gradients by the input's name, in the case's layout and shapes."""
        contestant = self.contestant
        output = self._output if self.direction == "backward" else self._forward()
        if isinstance(output, Tensor):
            found = {"output": contestant.to_case(output.detach())}
        else:
            found = {"output": contestant.to_case(output)}
        if self._leaves:
            grads = torch.autograd.grad(output, self._leaves, self._grad, retain_graph=True)
            targets = {name: x for name, x in self.inputs.items() if differentiable(x)}
            grads = contestant.chain(grads, self.inputs)
            for (name, x), grad in zip(targets.items(), grads, strict=True):
                found[f"gradient of {name}"] = grad.sum_to_size(x.shape)
        return found

    def _forward(self) -> Tensor:
        return self._function(*self._arguments)

    def _backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self._output, self._leaves, self._grad, retain_graph=True)

    def _both(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self._forward(), self._leaves, self._grad)


def differentiable(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()
