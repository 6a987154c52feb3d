"""Inputs for the monarch family and the checks that every backend is held to.

Values and gradients may be off float64's by at most twice what the reference in the same dtype
is, plus rounding.
"""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from kexue_kernels import monarch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.complex64)


@dataclass(frozen=True)
class Case:
    """One call of monarch_matmul, with w1 [k, q, p] and w2 [l, s, k*q/l]."""

    k: int = 3
    q: int = 4
    p: int = 5
    l: int = 6
    s: int = 7
    N: int = 9
    dtype: torch.dtype = torch.float32
    bias: bool = True
    strided: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        words = [f"{self.N}x{self.k}.{self.q}.{self.p}.{self.l}.{self.s}", dtype]
        return "-".join(words + ["plain"] * (not self.bias) + ["strided"] * self.strided)

    @property
    def r(self) -> int:
        return self.k * self.q // self.l

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            "x": (self.N, self.k * self.p),
            "w1": (self.k, self.q, self.p),
            "w2": (self.l, self.s, self.r),
        }
        return shapes | ({"bias": (self.s * self.l,)} if self.bias else {})

    def out_features(self) -> int:
        return self.s * self.l

    def call(self, inputs: dict[str, Tensor], backend: str) -> Tensor:
        return monarch.monarch_matmul(**inputs, backend=backend)


@dataclass(frozen=True)
class Blocks(Case):
    """One call of block_diag_matmul, with w [k, q, p]; l and s are not used."""

    def __str__(self) -> str:
        return "blocks-" + super().__str__()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {"x": (self.N, self.k * self.p), "w": (self.k, self.q, self.p)}
        return shapes | ({"bias": (self.k * self.q,)} if self.bias else {})

    def out_features(self) -> int:
        return self.k * self.q

    def call(self, inputs: dict[str, Tensor], backend: str) -> Tensor:
        return monarch.block_diag_matmul(**inputs, backend=backend)


SIZES = (
    {},  # l doesn't divide q
    {"k": 4, "q": 8, "p": 16, "l": 4, "s": 8, "N": 17},
    {"k": 2, "q": 5, "p": 3, "l": 10, "s": 2, "N": 33},  # q smaller than l
    {"k": 5, "q": 2, "p": 1, "l": 1, "s": 3, "N": 1},  # one block in the second factor
    {"k": 1, "q": 6, "p": 4, "l": 3, "s": 1, "N": 2},  # and in the first
)
CASES = [Case(**size, dtype=dtype) for size in SIZES for dtype in DTYPES]
CASES += [Case(bias=False), Case(N=70, bias=False, dtype=torch.bfloat16)]
CASES += [Case(strided=True, dtype=dtype) for dtype in DTYPES]
BLOCKS = [Blocks(**size, dtype=dtype) for size in SIZES[:3] for dtype in DTYPES]
BLOCKS += [Blocks(bias=False), *(Blocks(strided=True, dtype=dtype) for dtype in DTYPES)]


@st.composite
def legal_cases(draw: st.DrawFn, blocks: bool = False) -> Case:
    """Any sizes and dtype, l any divisor of k*q."""
    k, q, p, s = (draw(st.integers(1, 7)) for _ in range(4))
    l = draw(st.sampled_from([n for n in range(1, k * q + 1) if k * q % n == 0]))
    kind = Blocks if blocks else Case
    return kind(
        k,
        q,
        p,
        l,
        s,
        N=draw(st.integers(1, 40)),
        dtype=draw(st.sampled_from(DTYPES)),
        bias=draw(st.booleans()),
        strided=draw(st.booleans()),
    )


def make(case: Case, device: str = "cpu", seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs by name, and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex64 if case.dtype.is_complex else torch.float32

    def draw(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=wide).to(case.dtype).to(device)
        return spread(x) if case.strided else x

    inputs = {name: draw(*shape) for name, shape in case.shapes().items()}
    return inputs, draw(case.N, case.out_features())


def spread(x: Tensor) -> Tensor:
    """The same numbers with other ones between them, the last axis slowest."""
    turned = x.movedim(-1, 0)
    return torch.stack([turned, turned + 1], dim=-1)[..., 0].movedim(0, -1)


def run(
    case: Case, inputs: dict[str, Tensor], grad: Tensor, backend: str = "auto"
) -> dict[str, Tensor]:
    """The output and the gradients, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y = case.call(leaves, backend)
    grads = torch.autograd.grad(y, list(leaves.values()), grad)
    return {"y": y.detach(), **{f"grad {n}": g for n, g in zip(leaves, grads, strict=True)}}


def check(case: Case, backend: str, device: str = "cpu", seed: int = 0) -> None:
    """Values, gradients, and that the same call gives the same bits."""
    inputs, grad = make(case, device, seed)
    exact = run(case, {n: widened(x) for n, x in inputs.items()}, widened(grad), "reference")
    own = run(case, {n: x.cpu() for n, x in inputs.items()}, grad.cpu(), "reference")
    found = run(case, inputs, grad, backend)
    again = run(case, inputs, grad, backend)
    for name, x in found.items():
        assert x.is_contiguous(), name
        check_close(name, x, own[name], exact[name])
        assert torch.equal(x, again[name]), name


def check_close(name: str, found: Tensor, own: Tensor, exact: Tensor) -> None:
    """Error against float64 at most twice the reference's in the same dtype, plus rounding."""
    assert found.shape == exact.shape, name
    assert found.dtype == own.dtype, name
    scale = exact.abs().max().item() if exact.numel() else 0.0
    allowed = 2 * error(own, exact) + 4 * torch.finfo(found.dtype).eps * scale
    assert error(found, exact) <= allowed, (name, error(found, exact), allowed)


def check_near(found: Tensor, expected: Tensor) -> None:
    """The same but for the order of sums, whose terms are about as large as the largest element."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if found.numel():
        allowed = 64 * torch.finfo(found.dtype).eps * expected.detach().abs().max()
        assert error(found.detach(), widened(expected.detach())) <= allowed


def error(x: Tensor, exact: Tensor) -> float:
    """The largest deviation; NaN and infinity count as infinite."""
    distance = (x.cpu().to(exact.dtype) - exact).abs()
    return distance.nan_to_num(nan=torch.inf, posinf=torch.inf).max().item() if x.numel() else 0.0


def widened(x: Tensor) -> Tensor:
    """The same numbers in double precision, on CPU."""
    return x.cpu().to(torch.complex128 if x.is_complex() else torch.float64)


def dense(w1: Tensor, w2: Tensor) -> Tensor:
    """The definition, hidden unit by hidden unit: [s*l, k*p].

    Unit m is output m mod q of block m // q of w1, and input m // l of block m mod l of w2, whose
    outputs are l apart.
    """
    (k, q, p), (l, s, _) = w1.shape, w2.shape
    found = w1.new_zeros(s * l, k * p)
    for m in range(k * q):
        column, row = w2[m % l, :, m // l], w1[m // q, m % q]
        found[m % l :: l, m // q * p : (m // q + 1) * p] += torch.outer(column, row)
    return found


def through_permutations(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """What fly and torch-structured document for `blockdiag_butterfly_multiply`.

    Both factors as matrices diag(w1) and diag(w2), and two permutations: hidden units from
    (r l) to (l r), outputs from (l s) to (s l).
    """
    (l, s, r) = w2.shape
    to_second = torch.arange(r * l).view(r, l).T.reshape(-1)
    to_output = torch.arange(l * s).view(l, s).T.reshape(-1)
    hidden = x @ torch.block_diag(*w1).T
    return (hidden[..., to_second] @ torch.block_diag(*w2).T)[..., to_output]
