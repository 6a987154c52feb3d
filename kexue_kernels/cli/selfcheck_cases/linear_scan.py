"""linear_scan's cases for `selfcheck`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kexue_kernels.checks import state_dtype
from kexue_kernels.cli.selfcheck_cases import Case, Tensors, draw
from kexue_kernels.scan import linear_scan


@dataclass(frozen=True)
class LinearScan:
    """One configuration; `a` is full, or one decay per channel for all steps ("channel")."""

    B: int = 2
    L: int = 50
    D: int = 11
    dtype: torch.dtype = torch.float32
    a: str = "full"
    reverse: bool = False
    lengths: tuple[int, ...] = ()  # of packed sequences
    initial: bool = True
    strided: bool = False

    @property
    def name(self) -> str:
        words = [f"[{self.B}, {self.L}, {self.D}]", str(self.dtype).removeprefix("torch.")]
        words += ["a per channel"] * (self.a == "channel") + ["reverse"] * self.reverse
        words += ["packed"] * bool(self.lengths) + ["strided"] * self.strided
        return " ".join(words + ["no initial state"] * (not self.initial))

    def make(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (self.B, self.L, self.D)
        a = draw(generator, *(shape if self.a == "full" else (self.D,)), dtype=self.dtype)
        a = torch.sgn(a) * (0.99 - 0.2 * torch.rand(a.shape, generator=generator)).to(self.dtype)
        inputs = {"a": a, "b": draw(generator, *shape, dtype=self.dtype)}
        if self.strided:  # neither axis has the stride of a contiguous tensor
            inputs = {name: _spread(x) for name, x in inputs.items()}
        if self.lengths:
            inputs["cu_seqlens"] = torch.tensor((0, *self.lengths)).cumsum(0)
        if self.initial:
            rows = len(self.lengths) or self.B
            inputs["initial_state"] = draw(generator, rows, self.D, dtype=state_dtype(self.dtype))
        return inputs

    def call(self, inputs: Tensors, backend: str) -> dict[str, Tensor]:
        h, final_state = linear_scan(
            inputs["a"],
            inputs["b"],
            inputs.get("initial_state"),
            reverse=self.reverse,
            cu_seqlens=inputs.get("cu_seqlens"),
            return_final_state=True,
            backend=backend,
        )
        return {"h": h, "final_state": final_state}

    def case(self, interpreted: bool = True) -> Case:
        floating = ("a", "b", "initial_state") if self.initial else ("a", "b")
        return Case("linear_scan", self.name, self.make, self.call, floating, interpreted)


def _spread(x: Tensor) -> Tensor:
    """The same numbers with other ones between them, channels slowest."""
    return torch.stack([x, x + 1], dim=-1).transpose(-2, -3).contiguous().transpose(-2, -3)[..., 0]


SHORT = (
    LinearScan(),
    LinearScan(reverse=True, B=3, L=33, D=17),
    LinearScan(dtype=torch.bfloat16),
    LinearScan(dtype=torch.float16, reverse=True, D=16),
    LinearScan(dtype=torch.complex64),
    LinearScan(dtype=torch.complex64, reverse=True, initial=False),
    LinearScan(a="channel"),
    LinearScan(a="channel", dtype=torch.bfloat16, reverse=True),
    LinearScan(a="channel", dtype=torch.complex64),
    LinearScan(B=1, L=90, lengths=(40, 0, 1, 49)),
    LinearScan(B=1, L=90, lengths=(40, 0, 1, 49), reverse=True, dtype=torch.complex64),
    LinearScan(strided=True),
    LinearScan(strided=True, dtype=torch.bfloat16, reverse=True),
    LinearScan(B=1, L=1, D=1, initial=False),
)
LONG = (  # where L is cut into chunks that run in parallel
    LinearScan(B=1, L=1100, D=24),
    LinearScan(B=1, L=1100, D=24, dtype=torch.bfloat16, reverse=True),
    LinearScan(B=1, L=1100, D=24, dtype=torch.complex64),
    LinearScan(B=1, L=1100, D=24, a="channel"),
    LinearScan(B=1, L=1100, D=24, lengths=(500, 0, 600), reverse=True),
)
CASES = [config.case() for config in SHORT] + [config.case(interpreted=False) for config in LONG]
