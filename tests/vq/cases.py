"""Inputs for the vq family and the checks that every backend is held to.

Indices must be the float64 argmin's, with no tolerance. Values and gradients may be off by at
most twice what the reference in the same dtype is, plus rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kexue_kernels import vq
from kexue_kernels.vq import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
METRICS = ("l2", "cosine", "dot")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Data:
    """Rows x [N, d] and codes [K, d] of one kind (see `KINDS`)."""

    kind: str
    N: int = 70
    K: int = 37
    d: int = 11
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kind}-{self.N}x{self.K}x{self.d}-{dtype}"

    def make(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        x, codebook = KINDS[self.kind](self, generator(seed))
        return x.to(self.dtype), codebook.to(self.dtype)


def _random(case: Data, g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(case.N, case.d, generator=g), torch.randn(case.K, case.d, generator=g)


def _clustered(case: Data, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each row lies next to a code; codes lie in few tight groups."""
    centres = torch.randn(3, case.d, generator=g)
    groups = centres[torch.randint(3, (case.K,), generator=g)]
    codebook = groups + 1e-3 * torch.randn(case.K, case.d, generator=g)
    chosen = codebook[torch.randint(case.K, (case.N,), generator=g)]
    return chosen + 1e-4 * torch.randn(case.N, case.d, generator=g), codebook


def _offset(case: Data, g: torch.Generator) -> tuple[Tensor, Tensor]:
    x, codebook = _random(case, g)
    return x + 100, codebook + 100


def _duplicated(case: Data, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every code is there several times; some rows are codes."""
    x, codebook = _random(case, g)
    codebook = codebook[torch.randint(max(1, case.K // 3), (case.K,), generator=g)]
    x[::2] = codebook[torch.randint(case.K, x[::2].shape[:1], generator=g)]
    return x, codebook


def _bisector(case: Data, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows between two codes, off the middle by as little as the dtype can say."""
    codebook = torch.randn(case.K, case.d, generator=g)
    i, j = torch.randint(case.K, (2, case.N), generator=g)
    shift = torch.randint(-2, 3, (case.N, 1), generator=g) * torch.finfo(case.dtype).eps
    return (codebook[i] + codebook[j]) / 2 + shift * (codebook[j] - codebook[i]), codebook


def _integers(case: Data, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Small integers: distances are exact, and many are equal between different codes."""
    x = torch.randint(-2, 3, (case.N, case.d), generator=g)
    return x.float(), torch.randint(-2, 3, (case.K, case.d), generator=g).float()


def _far(case: Data, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """A code and some rows far away, others hardly apart: no bound for all codes would do."""
    x, codebook = _random(case, g)
    codebook[1:] *= 1e-3
    codebook[0] *= 1e4
    x[::3] *= 100
    return x, codebook


def _zeros(case: Data, g: torch.Generator) -> tuple[Tensor, Tensor]:
    x, codebook = _random(case, g)
    x[::3] = 0
    codebook[case.K // 2 :: 3] = 0
    return x, codebook


def _broken(case: Data, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """NaN and infinities in some rows and codes, the first code among them."""
    x, codebook = _random(case, g)
    for number, at in ((torch.nan, 0), (torch.inf, 1), (-torch.inf, 2)):
        x[at::7, at % case.d] = number
        codebook[at::5, (at + 1) % case.d] = number
    return x, codebook


def _tiny(case: Data, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Squares below the smallest float32."""
    x, codebook = _random(case, g)
    scale = 1e-30 if case.dtype != torch.float16 else 1e-7
    return scale * x, scale * codebook


def _huge(case: Data, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Squares above the largest float32."""
    x, codebook = _random(case, g)
    scale = 1e30 if case.dtype != torch.float16 else 1e4
    return scale * x, scale * codebook


KINDS: dict[str, Callable[[Data, torch.Generator], tuple[Tensor, Tensor]]] = {
    "random": _random,
    "clustered": _clustered,
    "offset": _offset,
    "duplicated": _duplicated,
    "bisector": _bisector,
    "integers": _integers,
    "far": _far,
    "zeros": _zeros,
    "broken": _broken,
    "tiny": _tiny,
    "huge": _huge,
}
EVERY_KIND = [Data(kind, dtype=dtype) for kind in KINDS for dtype in DTYPES]
SHAPES = [
    Data("random", N=1, K=1, d=1),
    Data("duplicated", N=3, K=2, d=1),
    Data("integers", N=130, K=1, d=3),
    Data("random", N=1, K=300, d=17),
    Data("offset", N=257, K=65, d=64),
    Data("bisector", N=64, K=128, d=33),
    Data("duplicated", N=5, K=5000, d=2, dtype=torch.bfloat16),
]


def nearest(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    """The definition in float64 for x [N, d], one code after the other; -1 where there is none."""
    x, codebook = x.double().cpu(), codebook.double().cpu()
    best = torch.full(x.shape[:1], torch.inf, dtype=torch.float64)
    found = torch.full(x.shape[:1], -1)
    for k, code in enumerate(codebook):
        if not code.isfinite().all():
            continue
        if metric == "l2":
            cost = (x - code).square().sum(-1)
        else:
            norm = code.square().sum().sqrt()
            cost = -(x * code).sum(-1)
            if metric == "cosine":
                cost = cost / norm if norm > 0 else torch.zeros_like(cost)
        better = (cost < best) | (found < 0)
        best, found = torch.where(better, cost, best), torch.where(better, k, found)
    return torch.where(x.isfinite().all(-1), found, -1)


def check_nearest(case: Data, metric: str, backend: str, device: str = "cpu") -> None:
    x, codebook = (t.to(device) for t in case.make())
    found = vq.nearest_codebook(x, codebook, metric=metric, backend=backend)
    assert found.dtype == torch.int64
    assert torch.equal(found.cpu(), nearest(x, codebook, metric))


@dataclass(frozen=True)
class Quantize:
    """One call of vector_quantize, its rows and codes of some kind."""

    data: Data
    gradient: str = "ste"
    metric: str = "l2"
    strided: bool = False

    def __str__(self) -> str:
        return f"{self.data}-{self.gradient}-{self.metric}" + "-strided" * self.strided


def every_quantize() -> list[Quantize]:
    found = [
        Quantize(Data(kind, dtype=dtype), gradient)
        for kind in ("random", "zeros", "broken", "duplicated")
        for dtype in DTYPES
        for gradient in ("ste", "rotation")
    ]
    found += [Quantize(data, "rotation", "cosine") for data in SHAPES]
    found += [Quantize(Data("offset"), "rotation"), Quantize(Data("random"), "ste", strided=True)]
    return [*found, Quantize(Data("random", dtype=torch.bfloat16), "rotation", "dot", True)]


QUANTIZE = every_quantize()


@dataclass
class Inputs:
    x: Tensor
    codebook: Tensor
    grad: Tensor
    scales: tuple[float, float]


def make(case: Quantize, device: str = "cpu", seed: int = 0) -> Inputs:
    x, codebook = (t.to(device) for t in case.data.make(seed))
    grad = torch.randn(x.shape, generator=generator(seed + 1)).to(x.dtype).to(device)
    if case.strided:
        x, codebook, grad = (_spread(t) for t in (x, codebook, grad))
    return Inputs(x, codebook, grad, (0.75, 1.5))


def _spread(x: Tensor) -> Tensor:
    """The same numbers with other ones between them, columns first."""
    return torch.stack([x.mT, x.mT + 1], dim=-1).contiguous()[..., 0].mT


def run(case: Quantize, inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """Outputs, and the gradients of their weighted sum, by name."""
    x, codebook = (t.detach().requires_grad_() for t in (inputs.x, inputs.codebook))
    call = vq.vector_quantize
    q, indices, *losses = call(
        x, codebook, metric=case.metric, gradient=case.gradient, backend=backend
    )
    weights = [losses[0].new_tensor(scale) for scale in inputs.scales]
    grads = torch.autograd.grad((q, *losses), (x, codebook), (inputs.grad, *weights))
    names = ("quantized", "indices", "commitment_loss", "codebook_loss", "grad_x", "grad_codebook")
    outputs = (out.detach() for out in (q, indices, *losses))
    return dict(zip(names, (*outputs, *grads), strict=True))


def widened(inputs: Inputs) -> Inputs:
    """The same numbers in double precision, on CPU."""
    x, codebook, grad = (t.cpu().double() for t in (inputs.x, inputs.codebook, inputs.grad))
    return Inputs(x, codebook, grad, inputs.scales)


def check_quantize(case: Quantize, backend: str, device: str = "cpu", seed: int = 0) -> None:
    inputs = make(case, device, seed)
    exact = run(case, widened(inputs), "reference")
    own = run(case, inputs, "reference")
    found = run(case, inputs, backend)
    assert torch.equal(found["indices"].cpu(), exact["indices"])
    check_bits(found["quantized"], inputs.codebook, found["indices"])
    for name in ("commitment_loss", "codebook_loss", "grad_x", "grad_codebook"):
        check_close(name, found[name], own[name], exact[name])


def check_bits(quantized: Tensor, codebook: Tensor, indices: Tensor) -> None:
    """quantized is codebook[indices], bit for bit; NaN where the index is -1."""
    assert quantized.dtype == codebook.dtype
    kept = indices >= 0
    as_integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[codebook.itemsize]
    chosen = codebook[indices[kept]]
    assert torch.equal(quantized[kept].view(as_integers), chosen.view(as_integers))
    assert quantized[~kept].isnan().all()


def check_close(name: str, found: Tensor, own: Tensor, exact: Tensor) -> None:
    """Error against float64 at most twice the reference's in the same dtype, plus rounding."""
    assert found.shape == exact.shape, name
    assert found.dtype == own.dtype, name
    scale = exact.abs().max().item() if exact.numel() else 0.0
    allowed = 2 * error(own, exact) + 4 * torch.finfo(found.dtype).eps * scale
    assert error(found, exact) <= allowed, (name, error(found, exact), allowed)


def error(x: Tensor, exact: Tensor) -> float:
    """The largest deviation; NaN and infinity count as infinite."""
    distance = (x.cpu().to(exact.dtype) - exact).abs()
    return distance.nan_to_num(nan=torch.inf, posinf=torch.inf).max().item() if x.numel() else 0.0


def check_statistics(
    x: Tensor, indices: Tensor, num_codes: int, backend: str, device: str = "cpu"
) -> None:
    x, indices = x.to(device), indices.to(device)
    counts, sums = vq.codebook_statistics(x, indices, num_codes, backend=backend)
    exact = reference.codebook_statistics(x.cpu().double(), indices.cpu(), num_codes)
    own = reference.codebook_statistics(x.cpu(), indices.cpu(), num_codes)
    assert counts.dtype == torch.int64
    assert torch.equal(counts.cpu(), exact[0])
    check_close("sums", sums, own[1], exact[1])
    again = vq.codebook_statistics(x, indices, num_codes, backend=backend)
    assert torch.equal(again[1], sums)
