"""Inputs for selective_scan and the check that every backend is held to, in value and gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor

import kexue_kernels as kk
from tests.scan.cases import error


@dataclass(frozen=True)
class Case:
    batch: int = 2
    L: int = 21
    d: int = 6
    n: int = 3
    dtype: torch.dtype = torch.float32
    complex: bool = False  # A, and so B, C and the states
    B: str = "step"  # [batch, L, n], or "group" [batch, L, 2, n], or "invariant" [d, n]
    C: str = "step"
    D: bool = True
    z: bool = True
    bias: bool = True
    softplus: bool = True
    initial: bool = True
    lengths: tuple[int, ...] | None = None  # of packed sequences; batch is 1 and L their sum
    strided: bool = False  # [B, D, L] by strides; B and C likewise

    def __str__(self) -> str:
        parts = [f"{self.batch}x{self.L}x{self.d}x{self.n}", str(self.dtype).removeprefix("torch.")]
        parts += ["complex"] * self.complex + [f"B_{self.B}"] * (self.B != "step")
        parts += [f"C_{self.C}"] * (self.C != "step") + ["packed"] * (self.lengths is not None)
        parts += ["strided"] * self.strided
        for name in ("D", "z", "bias", "softplus", "initial"):
            parts += [f"no_{name}"] * (not getattr(self, name))
        return "-".join(parts)


def packed(lengths: tuple[int, ...], **options: object) -> Case:
    return Case(batch=1, L=sum(lengths), lengths=lengths, **options)  # type: ignore[arg-type]


NOTHING = {"D": False, "z": False, "bias": False, "softplus": False, "initial": False}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BASIC = [Case(dtype=dtype) for dtype in DTYPES] + [Case(**NOTHING), Case(complex=True)]
OPTIONS = [
    Case(z=False),
    Case(D=False, initial=False),
    Case(bias=False, softplus=False),
    Case(softplus=False, dtype=torch.float16),
    Case(complex=True, **NOTHING),
    Case(complex=True, dtype=torch.bfloat16, z=False),
]
MATRICES = [
    Case(B="group", C="group"),
    Case(B="invariant", C="step"),
    Case(B="group", C="invariant", dtype=torch.bfloat16),
    Case(B="invariant", C="invariant", dtype=torch.float16),
    Case(B="invariant", C="group", complex=True),
    Case(B="group", C="invariant", complex=True, initial=False),
]
SHAPES = [
    Case(batch=1, L=1, d=1, n=1),
    Case(batch=3, L=32, d=5, n=16),
    Case(batch=1, L=70, d=3, n=2),
    Case(batch=1, L=33, d=35, n=4),
    Case(batch=1, L=40, d=2, n=17),
    Case(batch=1, L=65, d=2, n=33),
]
PACKED = [
    packed((3, 0, 37, 1, 0)),
    packed((0, 32, 33), dtype=torch.bfloat16, B="group", initial=False),
    packed((40, 24, 1), complex=True, B="invariant"),
    packed((5,), C="invariant"),
]
STRIDED = [
    Case(strided=True, B="group"),
    Case(strided=True, dtype=torch.bfloat16),
    Case(strided=True, complex=True, z=False),
]
ALL = BASIC + OPTIONS + MATRICES + SHAPES + PACKED + STRIDED

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
Tensors = dict[str, Tensor]


@dataclass
class Inputs:
    tensors: Tensors  # by argument name, those that are given
    cu_seqlens: Tensor | None
    grad_out: Tensor
    grad_final: Tensor


def make(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    """Seeded random inputs: steps around 0.1 to 1, decays that forget within tens of steps."""
    g = torch.Generator().manual_seed(seed)
    batch, L, d, n = case.batch, case.L, case.d, case.n
    rows = batch if case.lengths is None else len(case.lengths)
    state = torch.complex64 if case.complex else torch.float32

    def draw(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        wide = dtype if dtype.is_complex else torch.float32
        return torch.randn(shape, generator=g, dtype=wide).to(dtype).to(device)

    def steps(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        x = draw(*shape, dtype=dtype)
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if case.strided else x

    def matrix(kind: str) -> Tensor:
        dtype = state if case.complex else case.dtype
        if kind == "invariant":
            return draw(d, n, dtype=state)
        return steps(batch, L, *((2,) if kind == "group" else ()), n, dtype=dtype)

    A = -0.2 - torch.rand((d, n), generator=g)
    if case.complex:
        A = torch.complex(A, 6 * torch.rand((d, n), generator=g))
    delta = steps(batch, L, d)
    tensors = {
        "u": steps(batch, L, d),
        "delta": delta - 1 if case.softplus else delta.abs() / 2,
        "A": A.to(device),
        "B": matrix(case.B),
        "C": matrix(case.C),
    }
    if case.D:
        tensors["D"] = draw(d, dtype=torch.float32)
    if case.z:
        tensors["z"] = steps(batch, L, d)
    if case.bias:
        tensors["delta_bias"] = draw(d, dtype=torch.float32).abs() / 4
    if case.initial:
        tensors["initial_state"] = draw(rows, d, n, dtype=state)
    cu_seqlens = None
    if case.lengths is not None:
        bounds = torch.tensor((0, *case.lengths)).cumsum(0)
        cu_seqlens = bounds.to(torch.int32 if seed % 2 else torch.int64).to(device)
    return Inputs(tensors, cu_seqlens, steps(batch, L, d), draw(rows, d, n, dtype=state))


def widened(inputs: Inputs) -> Inputs:
    """The same numbers in double precision, on CPU."""

    def wide(x: Tensor) -> Tensor:
        return x.detach().cpu().to(torch.complex128 if x.is_complex() else torch.float64)

    cu_seqlens = None if inputs.cu_seqlens is None else inputs.cu_seqlens.cpu()
    tensors = {name: wide(x) for name, x in inputs.tensors.items()}
    return Inputs(tensors, cu_seqlens, wide(inputs.grad_out), wide(inputs.grad_final))


def run(case: Case, inputs: Inputs, backend: str) -> Tensors:
    """Outputs and gradients by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.tensors.items()}
    out, final = kk.selective_scan(
        **leaves,
        delta_softplus=case.softplus,
        cu_seqlens=inputs.cu_seqlens,
        return_final_state=True,
        backend=backend,
    )
    grads = torch.autograd.grad((out, final), leaves.values(), (inputs.grad_out, inputs.grad_final))
    named = {f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}
    return {"out": out.detach(), "final_state": final.detach(), **named}


def nudged(inputs: Inputs) -> Inputs:
    """Every number off by one float32 rounding, up or down."""
    g = torch.Generator().manual_seed(0)
    eps = torch.finfo(torch.float32).eps

    def nudge(x: Tensor) -> Tensor:
        return x * (1 + eps * (2 * torch.randint(2, x.shape, generator=g) - 1))

    tensors = {name: nudge(x) for name, x in inputs.tensors.items()}
    return Inputs(tensors, inputs.cu_seqlens, inputs.grad_out, inputs.grad_final)


def check(case: Case, backend: str, device: str = "cpu", seed: int = 0) -> None:
    """Error against float64 at most twice that of the reference in the same dtype, plus rounding.

    Both have float32 arithmetic inside. The rounding allowed is four units of the result's dtype
    at its largest value, and four times what one float32 rounding of the inputs makes of it:
    where a gradient is a sum that cancels, that is what any float32 arithmetic can know.
    """
    inputs = make(case, device, seed)
    wide = widened(inputs)
    exact, near = run(case, wide, "reference"), run(case, nudged(wide), "reference")
    found = run(case, inputs, backend)
    torch_own = run(case, inputs, "reference")
    assert found.keys() == torch_own.keys()
    for name, value in found.items():
        own, true = torch_own[name].cpu(), exact[name]
        assert value.shape == true.shape, name
        assert value.dtype == own.dtype, name
        rounding = torch.finfo(value.dtype).eps * true.abs().max().item() + error(near[name], true)
        allowed = 2 * error(own, true) + 4 * rounding
        assert error(value.cpu(), true) <= allowed, (name, error(value.cpu(), true), allowed)
