"""Inputs for linear_scan and the check that every backend is held to, in value and gradient."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import kexue_kernels as kk
from kexue_kernels.checks import state_dtype

WIDE = {torch.complex64: torch.complex128}


@dataclass(frozen=True)
class Case:
    B: int = 2
    L: int = 17
    D: int = 5
    dtype: torch.dtype = torch.float32
    a: str = "full"  # or "channel" [D], "invariant" [1, 1, D], "batch" [B, 1, D], "step" [L, 1]
    reverse: bool = False
    lengths: tuple[int, ...] | None = None  # of packed sequences; B is then 1 and L their sum
    initial: str | None = "state"  # its dtype: the state's or the "data"'s; None: no state
    strided: bool = False  # transposed and sliced inputs, an expanded gradient

    def __str__(self) -> str:
        parts = [f"{self.B}x{self.L}x{self.D}", str(self.dtype).removeprefix("torch."), self.a]
        parts += ["reverse"] * self.reverse + ["packed"] * (self.lengths is not None)
        parts += ["stateless"] * (self.initial is None) + ["strided"] * self.strided
        return "-".join(parts)


def packed(lengths: tuple[int, ...], **options: object) -> Case:
    return Case(B=1, L=sum(lengths), lengths=lengths, **options)  # type: ignore[arg-type]


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.complex64)
BASIC = [Case(dtype=dtype, reverse=reverse) for dtype in DTYPES for reverse in (False, True)]
DECAYS = [
    Case(dtype=dtype, a=a, reverse=reverse)
    for dtype in (torch.float32, torch.complex64)
    for a in ("channel", "invariant", "batch", "step")
    for reverse in (False, True)
] + [Case(dtype=torch.bfloat16, a="channel")]
PACKED = [
    packed((3, 0, 9, 1, 0), dtype=dtype, a=a, reverse=reverse, D=4)
    for dtype in (torch.float32, torch.complex64)
    for a in ("full", "channel")
    for reverse in (False, True)
] + [packed((0, 0, 7), dtype=torch.bfloat16), packed((5,), initial=None)]
SHAPES = [
    Case(B=1, L=1, D=1),
    Case(B=3, L=1, D=7),
    Case(B=1, L=70, D=1),
    Case(B=2, L=33, D=67),
    Case(B=5, L=4, D=8, initial=None),
    Case(initial="data", dtype=torch.bfloat16),
]
STRIDED = [
    Case(dtype=dtype, strided=True, reverse=reverse, a=a)
    for dtype, a in ((torch.float32, "full"), (torch.bfloat16, "full"), (torch.complex64, "full"))
    for reverse in (False, True)
] + [Case(strided=True, a="channel")]
ALL = BASIC + DECAYS + PACKED + SHAPES + STRIDED


@dataclass
class Inputs:
    a: Tensor
    b: Tensor
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    grad_h: Tensor
    grad_final: Tensor

    def leaves(self) -> list[Tensor]:
        return [x for x in (self.a, self.b, self.initial_state) if x is not None]


def make(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    """Seeded random inputs: |a| in [0.8, 1), random signs or phases; a as its case shapes it."""
    g = torch.Generator().manual_seed(seed)
    wide = case.dtype if case.dtype.is_complex else torch.float32

    def draw(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(shape, generator=g, dtype=wide).to(dtype).to(device)

    a_shape = {
        "full": (case.B, case.L, case.D),
        "channel": (case.D,),
        "invariant": (1, 1, case.D),
        "batch": (case.B, 1, case.D),
        "step": (case.L, 1),
    }[case.a]
    sign = torch.sgn(torch.randn(a_shape, generator=g, dtype=wide))
    a = (sign * (0.8 + 0.2 * torch.rand(a_shape, generator=g))).to(case.dtype).to(device)
    b = draw(case.B, case.L, case.D)
    grad_h = draw(case.B, case.L, case.D)
    if case.strided:
        b = torch.cat([b, b], dim=2).mT.contiguous().mT[..., ::2][..., : case.D]
        a = a.mT.contiguous().mT if a.ndim == 3 else a
        grad_h = grad_h[:, :1].expand(case.B, case.L, case.D)
    rows = case.B if case.lengths is None else len(case.lengths)
    state = state_dtype(case.dtype)
    initial = None
    if case.initial is not None:
        initial = draw(rows, case.D, dtype=state if case.initial == "state" else case.dtype)
    cu_seqlens = None
    if case.lengths is not None:
        steps = torch.tensor((0, *case.lengths)).cumsum(0)
        cu_seqlens = steps.to(torch.int32 if seed % 2 else torch.int64).to(device)
    grad_final = draw(rows, case.D, dtype=state)
    return Inputs(a, b, initial, cu_seqlens, grad_h, grad_final)


def widened(inputs: Inputs) -> Inputs:
    """The same numbers in double precision, on CPU."""

    def wide(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return x.detach().cpu().to(torch.complex128 if x.is_complex() else torch.float64)

    cu_seqlens = None if inputs.cu_seqlens is None else inputs.cu_seqlens.cpu()
    every = [inputs.a, inputs.b, inputs.initial_state, inputs.grad_h, inputs.grad_final]
    a, b, initial, grad_h, grad_final = (wide(x) for x in every)
    return Inputs(a, b, initial, cu_seqlens, grad_h, grad_final)  # type: ignore[arg-type]


def run(case: Case, inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    leaves = {"a": inputs.a, "b": inputs.b, "initial_state": inputs.initial_state}
    leaves = {k: x.detach().requires_grad_() for k, x in leaves.items() if x is not None}
    h, final = kk.linear_scan(
        **leaves,
        reverse=case.reverse,
        cu_seqlens=inputs.cu_seqlens,
        return_final_state=True,
        backend=backend,
    )
    grads = torch.autograd.grad((h, final), leaves.values(), (inputs.grad_h, inputs.grad_final))
    named = {f"grad_{name}": g for name, g in zip(leaves, grads, strict=True)}
    return {"h": h.detach(), "final_state": final.detach(), **named}


def plain(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """As `run`, by a loop that keeps every number in the data's own dtype."""
    leaves = [x.detach().requires_grad_() for x in inputs.leaves()]
    a, b, *initial = leaves
    rows = case.B if case.lengths is None else len(case.lengths)
    states = initial[0].to(b.dtype) if initial else b.new_zeros(rows, case.D)
    a = a.expand(b.shape)
    lengths = [case.L] if case.lengths is None else list(case.lengths)
    hs, finals, start = [], [], 0
    for n, length in enumerate(lengths):
        state = states if case.lengths is None else states[n : n + 1]
        order = list(range(start, start + length))
        h = {}
        for t in reversed(order) if case.reverse else order:
            state = a[:, t] * state + b[:, t]
            h[t] = state
        hs += [h[t] for t in order]
        finals.append(state)
        start += length
    out = torch.stack(hs, 1), torch.cat(finals)
    grads = torch.autograd.grad(out, leaves, (inputs.grad_h, inputs.grad_final.to(b.dtype)))
    names = ["grad_a", "grad_b", "grad_initial_state"][: len(leaves)]
    return dict(zip(["h", "final_state", *names], [*out, *grads], strict=True))


def check(case: Case, backend: str, device: str = "cpu", seed: int = 0) -> None:
    """Error against float64 at most twice that of PyTorch in the same dtype, plus rounding.

    "In the same dtype" is the reference (float32 accumulation), except for grad_a in half
    precision, where h was rounded when it was returned: there it is the plain loop.
    """
    inputs = make(case, device, seed)
    exact = run(case, widened(inputs), "reference")
    found = run(case, inputs, backend)
    torch_own = run(case, inputs, "reference")
    if case.dtype in (torch.bfloat16, torch.float16):
        torch_own["grad_a"] = plain(case, inputs)["grad_a"]
    for name, value in found.items():
        own, true = torch_own[name].cpu(), exact[name]
        assert value.shape == true.shape, name
        assert value.dtype == own.dtype or name == "grad_a", name
        scale = true.abs().max().item()
        allowed = 2 * error(own, true) + 4 * torch.finfo(value.dtype).eps * scale
        assert error(value.cpu(), true) <= allowed, (name, error(value.cpu(), true), allowed)


def error(x: Tensor, true: Tensor) -> float:
    """The largest deviation; NaN and infinity count as infinite."""
    distance = (x.to(true.dtype) - true).abs()
    return distance.nan_to_num(nan=torch.inf, posinf=torch.inf).max().item()


def shorter(case: Case, L: int) -> Case:
    return replace(case, L=L)
