"""The cases of selective_scan for `selfcheck`, and those of its other layout."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kexue_kernels.cli.selfcheck_cases import Case, Tensors, draw
from kexue_kernels.scan import selective_scan, selective_scan_fn


@dataclass(frozen=True)
class SelectiveScan:
    """One configuration; B and C vary over time ("step"), by groups too ("group"), or not."""

    batch: int = 2
    L: int = 40
    d: int = 6
    n: int = 4
    dtype: torch.dtype = torch.float32
    complex: bool = False
    matrices: str = "step"  # or "group", "invariant"
    bare: bool = False  # no D, z, delta_bias, softplus or initial state
    lengths: tuple[int, ...] = ()  # of packed sequences
    strided: bool = False  # [batch, d, L] by strides

    @property
    def name(self) -> str:
        words = [f"[{self.batch}, {self.L}, {self.d}] n = {self.n}"]
        words += [str(self.dtype).removeprefix("torch."), *(["complex A"] * self.complex)]
        words += [f"B, C by {self.matrices}"] * (self.matrices != "step")
        words += ["packed"] * bool(self.lengths) + ["strided"] * self.strided
        return " ".join(words + ["bare"] * self.bare)

    def make(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        batch, L, d, n = self.batch, self.L, self.d, self.n
        state = torch.complex64 if self.complex else torch.float32

        def steps(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            x = draw(generator, *shape, dtype=dtype)
            return x.movedim(1, -1).contiguous().movedim(-1, 1) if self.strided else x

        def matrix() -> Tensor:
            if self.matrices == "invariant":
                return draw(generator, d, n, dtype=state)
            groups = (2,) if self.matrices == "group" else ()
            return steps(batch, L, *groups, n, dtype=state if self.complex else self.dtype)

        A = -0.2 - torch.rand((d, n), generator=generator)
        if self.complex:
            A = torch.complex(A, 2 * torch.rand((d, n), generator=generator))
        inputs = {"u": steps(batch, L, d), "delta": steps(batch, L, d).abs() / 4, "A": A}
        inputs |= {"B": matrix(), "C": matrix()}
        if not self.bare:
            rows = len(self.lengths) or batch
            inputs |= {"D": draw(generator, d), "z": steps(batch, L, d)}
            inputs |= {"delta_bias": draw(generator, d) - 1}
            inputs |= {"initial_state": draw(generator, rows, d, n, dtype=state)}
        if self.lengths:
            inputs["cu_seqlens"] = torch.tensor((0, *self.lengths)).cumsum(0)
        return inputs

    def call(self, inputs: Tensors, backend: str) -> dict[str, Tensor]:
        out, final_state = selective_scan(
            **inputs, delta_softplus=not self.bare, return_final_state=True, backend=backend
        )
        return {"out": out, "final_state": final_state}

    def call_mamba_layout(self, inputs: Tensors, backend: str) -> dict[str, Tensor]:
        turned = {name: x.mT if x.ndim == 3 else x for name, x in inputs.items()}
        u, delta, A, B, C = (turned[name] for name in ("u", "delta", "A", "B", "C"))
        out, last_state = selective_scan_fn(
            u, delta, A, B, C, return_last_state=True, backend=backend
        )
        return {"out": out.mT, "last_state": last_state}

    def case(self, interpreted: bool = True) -> Case:
        floating = tuple(name for name in self.make() if name != "cu_seqlens")
        return Case("selective_scan", self.name, self.make, self.call, floating, interpreted)

    def case_fn(self) -> Case:
        floating = tuple(self.make())
        call, kernels = self.call_mamba_layout, "selective_scan"
        return Case("selective_scan_fn", self.name, self.make, call, floating, kernels=kernels)


SHORT = (
    SelectiveScan(),
    SelectiveScan(dtype=torch.bfloat16, matrices="group"),
    SelectiveScan(L=9, complex=True, matrices="invariant", bare=True),
    SelectiveScan(batch=1, lengths=(17, 0, 1, 22)),
    SelectiveScan(batch=1, L=1, d=1, n=1, bare=True),
)
LONG = (  # the others, and L cut into splits that run in parallel
    SelectiveScan(bare=True, L=33, n=3),
    SelectiveScan(dtype=torch.float16),
    SelectiveScan(matrices="invariant", n=16),
    SelectiveScan(complex=True, d=16),
    SelectiveScan(strided=True),
    SelectiveScan(batch=1, L=1100, d=8, n=16),
    SelectiveScan(batch=1, L=1100, d=8, dtype=torch.bfloat16, matrices="group"),
    SelectiveScan(batch=1, L=1100, d=8, complex=True, bare=True),
    SelectiveScan(batch=1, L=1100, d=8, lengths=(500, 0, 600)),
)
CASES = [
    *(config.case() for config in SHORT),
    *(config.case(interpreted=False) for config in LONG),
    SelectiveScan(bare=True).case_fn(),
]
