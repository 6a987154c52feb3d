"""FlashMLA's published cases of dense decoding, and what it asks of their results.

Source: DeepSeek-AI, FlashMLA, `tests/test_flash_mla_dense_decoding.py`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import kexue_kernels as kk

DC, DR, BLOCK_SIZE = 512, 64, 64
NO_BLOCK = 2147480000


@dataclass(frozen=True)
class FlashCase:
    B: int
    Tq: int
    tokens: int  # of each sequence; their mean where lengths vary
    H: int
    vary: bool
    causal: bool
    some_empty: bool = False

    def __str__(self) -> str:
        flags = {"vary": self.vary, "causal": self.causal, "empty": self.some_empty}
        sizes = f"B{self.B}-{self.tokens}-H{self.H}-Tq{self.Tq}"
        return "-".join([sizes, *(name for name, given in flags.items() if given)])


def lengths(case: FlashCase, g: torch.Generator) -> Tensor:
    found = torch.full((case.B,), case.tokens)
    if case.vary:
        spread = torch.randn(case.B, generator=g) * case.tokens / 2
        found = (found + spread).long().clamp_min(case.Tq)
    if case.some_empty:
        found[torch.randn(case.B, generator=g) > 0] = 0
    return found.int()


def make(case: FlashCase, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k_cache, block_table and cache_seqlens: blocks shuffled, all beyond an end NaN."""
    g = torch.Generator().manual_seed(0)
    seqlens = lengths(case, g)
    width = -(-int(seqlens.max()) // 256) * 256 // BLOCK_SIZE or 1
    table = torch.randperm(case.B * width, generator=g).int().view(case.B, width).to(device)
    on_device = torch.Generator(device).manual_seed(1)
    options = {"generator": on_device, "device": device}
    q = torch.randn(case.B, case.Tq, case.H, DC + DR, **options)
    cache = torch.randn(case.B * width, BLOCK_SIZE, 1, DC + DR, **options)
    q, cache = ((x / 10).clamp(-1, 1).bfloat16() for x in (q, cache))
    for row, length in zip(table, seqlens.tolist(), strict=True):
        used = -(-length // BLOCK_SIZE)
        cache[row[used:].long()] = torch.nan
        if length % BLOCK_SIZE:
            cache[row[used - 1], length % BLOCK_SIZE :] = torch.nan
        row[used:] = NO_BLOCK
    return q, cache, table, seqlens.to(device)


def check(case: FlashCase, backend: str, device: str = "cpu") -> None:
    q, cache, table, seqlens = make(case, device)
    out, lse = kk.flash_mla_with_kvcache(
        q, cache, table, seqlens, DC, causal=case.causal, backend=backend
    )
    true, true_lse = kk.reference.flash_mla_with_kvcache(
        q.double(), cache.double(), table, seqlens, DC, causal=case.causal
    )
    agree("out", out, true.bfloat16(), 8e-4, 2.01 / 128, 5e-6)
    agree("lse", lse, true_lse.float(), 1e-6, 8.01 / 65536, 1e-7)


def agree(
    name: str, found: Tensor, true: Tensor, absolute: float, relative: float, cosine: float
) -> None:
    """Every number by its absolute or its relative error, and all together by their angle."""
    assert found.dtype == true.dtype, name
    assert torch.equal(found.isinf(), true.isinf()), name
    assert torch.equal(found[found.isinf()], true[true.isinf()]), name
    x, y = (t.masked_fill(t.isinf(), 0).double() for t in (found, true))
    off = (x - y).abs()
    wrong = ~((off < absolute) | (off / (y.abs() + 1e-6) < relative))
    assert not wrong.any(), (name, int(wrong.sum()), off[wrong].max())
    total = (x * x).sum() + (y * y).sum()
    if y.square().sum() > 1e-12:
        assert 1 - 2 * (x * y).sum() / total < cosine, name
