"""Inputs for mla_decode and the check that every backend is held to."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import kexue_kernels as kk

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One call. Pages are shuffled, and what lies beyond a sequence's end is poisoned."""

    lengths: tuple[int, ...] = (7, 0, 33, 16)
    Tq: int = 1
    H: int = 3
    dc: int = 20
    dr: int = 4
    block_size: int = 8
    dtype: torch.dtype = torch.float32
    causal: bool = True
    num_splits: int | None = None
    shared: bool = False  # the first block of every sequence is the same
    strided: bool = False
    head_dim_v: int | None = None  # dc if None

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"{self.Tq}x{self.H}x{self.dc}+{self.dr}-page{self.block_size}"
        flags = {"all": not self.causal, "shared": self.shared, "strided": self.strided}
        flags |= {
            f"{self.num_splits}splits": self.num_splits,
            f"v{self.head_dim_v}": self.head_dim_v,
        }
        return "-".join(
            [f"{max(self.lengths, default=0)}", sizes, dtype, *(k for k, v in flags.items() if v)]
        )

    @property
    def scale(self) -> float:
        return (self.dc + self.dr) ** -0.5


CASES = [
    *(Case(dtype=dtype) for dtype in (torch.float32, *HALVES)),
    *(Case((5, 40, 2, 0), Tq=4, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)),
    Case((5, 40, 2, 0), Tq=4, causal=False),
    Case((1, 30), H=17, dc=32, dr=16, block_size=1, dtype=torch.bfloat16),
    Case((70,), H=1, dc=64, dr=0, block_size=64, num_splits=3),
    Case((70, 3), block_size=5, num_splits=2, Tq=2, dtype=torch.float16),
    Case(shared=True, lengths=(9, 12, 8)),
    Case(strided=True, dtype=torch.bfloat16),
    Case(head_dim_v=24),
    Case(head_dim_v=7, lengths=(19, 4)),
]


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    kv_cache: Tensor
    block_table: Tensor
    cache_seqlens: Tensor

    def with_data(self, q: Tensor, kv_cache: Tensor) -> "Inputs":
        return replace(self, q=q, kv_cache=kv_cache)


def make(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    width, B = case.dc + case.dr, len(case.lengths)
    pages = [-(-length // case.block_size) for length in case.lengths]
    num_blocks = sum(pages) + 3
    order = torch.randperm(num_blocks, generator=g)
    cache = torch.full((num_blocks, case.block_size, width), torch.nan)
    table = torch.full((B, max(pages, default=0) + 2), 2**30, dtype=torch.int32)
    for b, (length, count) in enumerate(zip(case.lengths, pages, strict=True)):
        own, order = order[:count].clone(), order[count:]
        if case.shared and count:
            own[0] = table[0, 0] if b else own[0]
        table[b, :count] = own.int()
        rows = torch.randn(count * case.block_size, width, generator=g)
        if not case.shared:
            rows[length:] = torch.nan
        cache[own] = rows.view(count, case.block_size, width)
    q = torch.randn(B, case.Tq, case.H, width, generator=g)
    q, cache = (x.to(case.dtype).to(device) for x in (q, cache))
    if case.strided:
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
        cache = torch.cat([cache, cache + 1], -1)[..., :width]
    seqlens = torch.tensor(case.lengths, dtype=torch.int32)
    return Inputs(q, cache, table.to(device), seqlens.to(device))


def run(case: Case, inputs: Inputs, backend: str) -> dict[str, Tensor]:
    out, lse = kk.mla_decode(
        inputs.q, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens,
        head_dim_v=case.head_dim_v or case.dc, softmax_scale=case.scale, causal=case.causal,
        num_splits=case.num_splits, return_lse=True, backend=backend,
    )  # fmt: skip
    return {"out": out, "lse": lse}


def check(case: Case, backend: str, device: str = "cpu", seed: int = 0) -> None:
    """Error against float64 at most twice the reference's in the same dtype, plus rounding."""
    inputs = make(case, device, seed)
    cpu = make(case, "cpu", seed)
    exact = run(case, cpu.with_data(cpu.q.double(), cpu.kv_cache.double()), "reference")
    own = run(case, cpu, "reference")
    found = run(case, inputs, backend)
    again = run(case, inputs, backend)
    for name, x in found.items():
        true = exact[name]
        assert x.shape == true.shape, name
        assert x.dtype == own[name].dtype, name
        assert torch.equal(x, again[name]), name
        none = true == -torch.inf
        assert torch.equal(x.cpu() == -torch.inf, none), name
        x, mine, true = (t.cpu().double().masked_fill(none, 0) for t in (x, own[name], true))
        scale = true.abs().max().item() if true.numel() else 0.0
        allowed = 2 * error(mine, true) + 4 * torch.finfo(found[name].dtype).eps * scale
        assert error(x, true) <= allowed, (name, error(x, true), allowed)


def error(x: Tensor, true: Tensor) -> float:
    distance = (x - true).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    return distance.max().item() if distance.numel() else 0.0
