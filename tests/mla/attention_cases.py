"""Inputs for mla_attention, its definition, and the check that every backend is held to."""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

import kexue_kernels as kk
from tests.mla.cases import HALVES, error

NAMES = ("q_nope", "q_rope", "kv_latent", "k_rope", "w_uk", "w_uv")


@dataclass(frozen=True)
class Case:
    """One call; `lengths` are those of sequences packed in a batch of 1."""

    B: int = 2
    T: int = 37
    H: int = 3
    dk: int = 12
    dr: int = 4
    dv: int = 10
    dc: int = 20
    dtype: torch.dtype = torch.float32
    causal: bool = True
    lengths: tuple[int, ...] = ()
    strided: bool = False
    scale: float | None = None

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"{self.B}x{self.T}x{self.H}-{self.dk}+{self.dr}-{self.dv}-{self.dc}-{dtype}"
        flags = {"full": not self.causal, "packed": self.lengths, "strided": self.strided}
        flags["scaled"] = self.scale is not None
        return "-".join([sizes, *(name for name, on in flags.items() if on)])

    def cu_seqlens(self, device: str = "cpu") -> Tensor | None:
        if not self.lengths:
            return None
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=device)


def packed(*lengths: int, **sizes: object) -> Case:
    return Case(**{"B": 1, "T": sum(lengths), "lengths": lengths, **sizes})


CASES = [
    *(Case(dtype=dtype) for dtype in (torch.float32, *HALVES)),
    *(Case(dtype=dtype, causal=False) for dtype in (torch.float32, *HALVES)),
    packed(9, 0, 1, 23, 0),
    packed(0, 20, 17, causal=False, dtype=torch.bfloat16),
    Case(1, 70, 5, 16, 16, 16, 32, dtype=torch.float16, scale=0.3),
    Case(dr=0),
    Case(scale=0.0),
    Case(1, 1, 1, 1, 1, 1, 1),
    Case(strided=True),
    Case(strided=True, dtype=torch.bfloat16, scale=-0.2),
]


def make(case: Case, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """The six inputs, of about unit scores, and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    B, T, H, dc = case.B, case.T, case.H, case.dc
    shapes = {
        "q_nope": (B, T, H, case.dk),
        "q_rope": (B, T, H, case.dr),
        "kv_latent": (B, T, dc),
        "k_rope": (B, T, case.dr),
        "w_uk": (H, case.dk, dc),
        "w_uv": (H, case.dv, dc),
        "grad": (B, T, H, case.dv),
    }
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in ("w_uk", "w_uv"):
        found[name] *= max(dc, 1) ** -0.5
    moved = {name: x.to(case.dtype).to(device) for name, x in found.items()}
    return {name: _strided(x) for name, x in moved.items()} if case.strided else moved


def _strided(x: Tensor) -> Tensor:
    """The same numbers, axes reversed in memory and every other place unused."""
    wide = x.new_full((*x.shape[::-1], 2), torch.nan)
    view = wide[..., 0].permute(*reversed(range(x.ndim)))
    return view.copy_(x)


def run(case: Case, inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """The output and the six gradients."""
    return _with_gradients(inputs, lambda *data: attend(case, data, backend))


def attend(case: Case, data: tuple[Tensor, ...], backend: str = "auto") -> Tensor:
    cu_seqlens = case.cu_seqlens(data[0].device.type)
    return kk.mla_attention(
        *data, softmax_scale=case.scale, causal=case.causal, cu_seqlens=cu_seqlens, backend=backend
    )


def plain(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Plain PyTorch in the inputs' dtype: all keys and values, all scores."""
    return _with_gradients(inputs, lambda *data: _in_full(case, *data))


def _in_full(
    case: Case,
    q_nope: Tensor,
    q_rope: Tensor,
    kv_latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
) -> Tensor:
    k = kv_latent[:, None] @ w_uk.mT  # [B, H, T, dk]
    v = kv_latent[:, None] @ w_uv.mT
    k = torch.cat([k, k_rope[:, None].expand(-1, case.H, -1, -1)], -1)
    q = torch.cat([q_nope, q_rope], -1).transpose(1, 2)
    scores = q @ k.mT * scale_of(case)
    scores = scores.masked_fill(~seen(case), -torch.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return (weights @ v).transpose(1, 2)


def scale_of(case: Case) -> float:
    return (case.dk + case.dr) ** -0.5 if case.scale is None else case.scale


def seen(case: Case) -> Tensor:
    """[T, T], token by token."""
    mask = torch.zeros(case.T, case.T, dtype=torch.bool)
    for first, last in pairwise(accumulate(case.lengths or (case.T,), initial=0)):
        for i in range(first, last):
            mask[i, first : i + 1 if case.causal else last] = True
    return mask


def _with_gradients(inputs: dict[str, Tensor], function: object) -> dict[str, Tensor]:
    assert callable(function)
    data = [inputs[name].detach().requires_grad_() for name in NAMES]
    out = function(*data)
    grads = torch.autograd.grad(out, data, inputs["grad"])
    return {"out": out.detach(), **dict(zip(NAMES, grads, strict=True))}


def check(case: Case, backend: str, device: str = "cpu", seed: int = 0) -> None:
    """Error against float64 at most twice plain PyTorch's in the same dtype, plus rounding."""
    cpu = make(case, "cpu", seed)
    exact = plain(case, {name: x.double() for name, x in cpu.items()})
    own = plain(case, cpu)
    inputs = make(case, device, seed)
    found, again = (run(case, inputs, backend) for _ in range(2))
    for name, x in found.items():
        true = exact[name]
        assert x.shape == true.shape, name
        assert x.dtype == case.dtype, name
        assert torch.equal(x, again[name]), name
        scale = true.abs().max().item() if true.numel() else 0.0
        allowed = 2 * error(own[name].double(), true) + 4 * torch.finfo(x.dtype).eps * scale
        wrong = error(x.cpu().double(), true)
        assert wrong <= allowed, (name, wrong, allowed)
