"""The vq family's cases for `selfcheck`. Indices are compared with no tolerance."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kexue_kernels.cli.selfcheck_cases import Case, Tensors, draw
from kexue_kernels.vq import (
    codebook_statistics,
    ema_update_,
    fsq,
    nearest_codebook,
    vector_quantize,
)


@dataclass(frozen=True)
class Rows:
    """Rows x [N, d] and codes [K, d]: random, shifted by 100, or every code there twice."""

    N: int = 100
    K: int = 37
    d: int = 11
    dtype: torch.dtype = torch.float32
    kind: str = "random"  # or "offset", "duplicated"

    @property
    def name(self) -> str:
        words = [f"{self.N} x {self.K} x {self.d}", str(self.dtype).removeprefix("torch.")]
        return " ".join(words + [self.kind] * (self.kind != "random"))

    def make(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, codebook = (draw(generator, rows, self.d) for rows in (self.N, self.K))
        if self.kind == "offset":
            x, codebook = x + 100, codebook + 100
        if self.kind == "duplicated":
            codebook[self.K // 2 :] = codebook[: self.K - self.K // 2].clone()
        return {"x": x.to(self.dtype), "codebook": codebook.to(self.dtype)}


def search(rows: Rows, metric: str = "l2", interpreted: bool = True) -> Case:
    def call(inputs: Tensors, backend: str) -> dict[str, Tensor]:
        x, codebook = inputs["x"], inputs["codebook"]
        return {"indices": nearest_codebook(x, codebook, metric=metric, backend=backend)}

    name = f"{rows.name} {metric}"
    return Case("nearest_codebook", name, rows.make, call, interpreted=interpreted)


def quantize(rows: Rows, gradient: str = "ste") -> Case:
    def call(inputs: Tensors, backend: str) -> dict[str, Tensor]:
        x, codebook = inputs["x"], inputs["codebook"]
        return vector_quantize(x, codebook, gradient=gradient, backend=backend)._asdict()

    name = f"{rows.name} {gradient}"
    return Case("vector_quantize", name, rows.make, call, ("x", "codebook"))


def statistics(rows: Rows) -> Case:
    def make() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        indices = torch.randint(-1, rows.K, (rows.N,), generator=generator)
        return {"x": rows.make()["x"], "indices": indices}

    def call(inputs: Tensors, backend: str) -> dict[str, Tensor]:
        x, indices = inputs["x"], inputs["indices"]
        counts, sums = codebook_statistics(x, indices, rows.K, backend=backend)
        return {"counts": counts, "sums": sums}

    return Case("codebook_statistics", rows.name, make, call)


def update(rows: Rows) -> Case:
    def make() -> dict[str, Tensor]:
        inputs = rows.make()
        generator = torch.Generator().manual_seed(1)
        indices = torch.randint(-1, rows.K, (rows.N,), generator=generator)
        size = torch.rand(rows.K, generator=generator) + 0.5
        total = size[:, None] * inputs["codebook"].float()
        return {**inputs, "cluster_size": size, "embed_sum": total, "indices": indices}

    def call(inputs: Tensors, backend: str) -> dict[str, Tensor]:
        running = {name: inputs[name].clone() for name in ("codebook", "cluster_size", "embed_sum")}
        ema_update_(
            running["codebook"],
            running["cluster_size"],
            running["embed_sum"],
            inputs["x"],
            inputs["indices"],
            decay=0.9,
            backend=backend,
        )
        return running

    return Case("ema_update_", rows.name, make, call, kernels="codebook_statistics")


def scalar(levels: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Case:
    def make() -> dict[str, Tensor]:
        return {"x": draw(torch.Generator().manual_seed(0), 50, len(levels), dtype=dtype)}

    def call(inputs: Tensors, _: str) -> dict[str, Tensor]:
        quantized, indices = fsq(inputs["x"], levels)
        return {"quantized": quantized, "indices": indices}

    name = f"levels {levels} {str(dtype).removeprefix('torch.')}"
    return Case("fsq", name, make, call, ("x",))


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [
    *(search(Rows(dtype=dtype), metric) for dtype in DTYPES for metric in ("l2", "cosine", "dot")),
    *(search(Rows(kind=kind, d=64)) for kind in ("offset", "duplicated")),
    search(Rows(N=3, K=700, d=33), "dot"),
    search(Rows(N=2000, K=1000, d=128, kind="offset"), interpreted=False),
    search(Rows(N=5, K=20000, d=64, dtype=torch.bfloat16), interpreted=False),
    *(
        quantize(Rows(dtype=dtype), gradient)
        for dtype in DTYPES
        for gradient in ("ste", "rotation")
    ),
    quantize(Rows(kind="duplicated", d=64), "rotation"),
    *(statistics(Rows(dtype=dtype)) for dtype in DTYPES),
    statistics(Rows(N=1000, K=3, d=65)),
    *(update(Rows(dtype=dtype)) for dtype in DTYPES),
    scalar((8, 5, 5, 5)),
    scalar((7, 2), torch.bfloat16),
]
