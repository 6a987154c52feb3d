"""The monarch family's cases for `selfcheck`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kexue_kernels.cli.selfcheck_cases import Case, Tensors, draw
from kexue_kernels.monarch import (
    block_diag_matmul,
    monarch_matmul,
    monarch_to_dense,
    project_to_monarch,
    reference,
)


@dataclass(frozen=True)
class Sizes:
    """Rows x [N, k*p], w1 [k, q, p] and w2 [l, s, r]; rows are strided if asked."""

    N: int = 9
    k: int = 3
    q: int = 4
    p: int = 5
    l: int = 6
    s: int = 7
    dtype: torch.dtype = torch.float32
    bias: bool = True
    strided: bool = False

    @property
    def r(self) -> int:
        return self.k * self.q // self.l

    @property
    def name(self) -> str:
        return f"{self.block_name} w2 [{self.l}, {self.s}, {self.r}]"

    @property
    def block_name(self) -> str:
        words = [str(self.dtype).removeprefix("torch."), f"[{self.N}, {self.k * self.p}]"]
        words += ["bias"] * self.bias + ["strided"] * self.strided
        return " ".join([*words, f"w1 [{self.k}, {self.q}, {self.p}]"])

    def make(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = {
            "x": (self.N, self.k * self.p),
            "w1": (self.k, self.q, self.p),
            "w2": (self.l, self.s, self.r),
            "bias": (self.s * self.l,),
        }
        drawn = {n: draw(generator, *shape, dtype=self.dtype) for n, shape in shapes.items()}
        if self.strided:  # neither axis of x has the stride of a contiguous tensor
            x = drawn["x"]
            drawn["x"] = torch.stack([x.mT, x.mT + 1], dim=-1)[..., 0].mT
        if not self.bias:
            del drawn["bias"]
        return drawn


def product(sizes: Sizes, interpreted: bool = True) -> Case:
    def call(inputs: Tensors, backend: str) -> dict[str, Tensor]:
        return {"y": monarch_matmul(**inputs, backend=backend)}

    leaves = tuple(sizes.make())
    return Case("monarch_matmul", sizes.name, sizes.make, call, leaves, interpreted)


def blocks(sizes: Sizes, interpreted: bool = True) -> Case:
    def make() -> dict[str, Tensor]:
        made = sizes.make()
        inputs = {"x": made["x"], "w": made["w1"]}
        if sizes.bias:
            generator = torch.Generator().manual_seed(1)
            inputs["bias"] = draw(generator, sizes.k * sizes.q, dtype=sizes.dtype)
        return inputs

    def call(inputs: Tensors, backend: str) -> dict[str, Tensor]:
        return {"y": block_diag_matmul(**inputs, backend=backend)}

    name = sizes.block_name.replace("w1", "w")
    return Case("block_diag_matmul", name, make, call, tuple(make()), interpreted)


def dense(sizes: Sizes) -> Case:
    def make() -> dict[str, Tensor]:
        made = sizes.make()
        return {name: made[name] for name in ("w1", "w2")}

    def call(inputs: Tensors, _: str) -> dict[str, Tensor]:
        return {"W": monarch_to_dense(**inputs)}

    return Case("monarch_to_dense", sizes.name, make, call, ("w1", "w2"))


def projection(out: int, into: int, nblocks: tuple[int, int], rank: int) -> Case:
    """The factors are those of a matrix up to a sign and more; compared is the matrix."""

    def make() -> dict[str, Tensor]:
        return {"weight": draw(torch.Generator().manual_seed(0), out, into)}

    def call(inputs: Tensors, backend: str) -> dict[str, Tensor]:
        project = reference.project_to_monarch if backend == "reference" else project_to_monarch
        w1, w2, error = project(inputs["weight"], nblocks, rank)
        return {"M": monarch_to_dense(w1, w2), "relative_error": error}

    return Case("project_to_monarch", f"[{out}, {into}] {nblocks} rank {rank}", make, call)


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.complex64)
CASES = [
    *(product(Sizes(dtype=dtype)) for dtype in DTYPES),
    product(Sizes(N=17, k=2, q=16, p=16, l=4, s=8, bias=False)),
    product(Sizes(N=3, k=2, q=5, p=3, l=10, s=2, dtype=torch.bfloat16, strided=True)),
    product(Sizes(N=300, k=32, q=32, p=32, l=32, s=32, dtype=torch.bfloat16), interpreted=False),
    product(Sizes(N=300, k=8, q=36, p=40, l=24, s=17), interpreted=False),
    *(blocks(Sizes(dtype=dtype)) for dtype in DTYPES),
    blocks(Sizes(N=3, q=17, bias=False, strided=True)),
    blocks(Sizes(N=300, k=32, q=40, p=32, dtype=torch.float16), interpreted=False),
    dense(Sizes()),
    dense(Sizes(dtype=torch.complex64)),
    projection(24, 40, (5, 4), 2),
    projection(64, 8, (2, 4), 1),
]
