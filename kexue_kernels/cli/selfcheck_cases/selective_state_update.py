"""The cases of selective_state_update for `selfcheck`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kexue_kernels.cli.selfcheck_cases import Case, Tensors, draw
from kexue_kernels.scan import selective_state_update


@dataclass(frozen=True)
class StateUpdate:
    """One configuration; with heads, state is [batch, heads, d, n]."""

    d: int = 20
    n: int = 16
    dtype: torch.dtype = torch.float32
    state: torch.dtype = torch.float32
    heads: int = 0
    indices: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        heads = f"{self.heads}, " if self.heads else ""
        words = [f"[3, {heads}{self.d}] n = {self.n}", str(self.dtype).removeprefix("torch.")]
        words += ["half state"] * (self.state != torch.float32)
        return " ".join(words + ["indices"] * bool(self.indices))

    def make(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        inner = (self.heads, self.d) if self.heads else (self.d,)
        groups = (2,) if self.heads else ()
        rows = max(self.indices) + 1 if self.indices else 3
        inputs = {"state": draw(generator, rows, *inner, self.n, dtype=self.state)}
        inputs |= {k: draw(generator, 3, *inner, dtype=self.dtype) for k in ("x", "dt", "z")}
        inputs |= {"A": -draw(generator, *inner, self.n).abs()}
        inputs |= {k: draw(generator, 3, *groups, self.n, dtype=self.dtype) for k in ("B", "C")}
        inputs |= {k: draw(generator, *inner) for k in ("D", "dt_bias")}
        if self.indices:
            inputs["state_batch_indices"] = torch.tensor(self.indices)
        return inputs

    def call(self, inputs: Tensors, backend: str) -> dict[str, Tensor]:
        state = inputs["state"].clone()
        out = selective_state_update(
            **{**inputs, "state": state}, dt_softplus=True, backend=backend
        )
        return {"out": out, "state": state}

    def case(self) -> Case:
        return Case("selective_state_update", self.name, self.make, self.call)


CASES = [
    StateUpdate().case(),
    StateUpdate(dtype=torch.bfloat16, n=5).case(),
    StateUpdate(dtype=torch.float16, state=torch.float16, heads=4, d=7).case(),
    StateUpdate(heads=4, indices=(5, -1, 0)).case(),
]
