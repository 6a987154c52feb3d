"""The mla family's cases for `selfcheck`. What a sequence must not read is NaN."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kexue_kernels.cli.selfcheck_cases import Case, Tensors, draw
from kexue_kernels.mla import (
    flash_mla_with_kvcache,
    merge_attention_states,
    mla_attention,
    mla_cache_append,
    mla_decode,
)


@dataclass(frozen=True)
class Cache:
    """Sequences on shuffled pages, and Tq queries of H heads each."""

    lengths: tuple[int, ...] = (0, 19, 40)
    Tq: int = 1
    H: int = 3
    dc: int = 24
    dr: int = 8
    block_size: int = 8
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        sizes = f"{len(self.lengths)} x {self.Tq} x {self.H} x {self.dc}+{self.dr}"
        return f"{sizes} page {self.block_size} {str(self.dtype).removeprefix('torch.')}"

    def make(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        pages = [-(-length // self.block_size) for length in self.lengths]
        order = torch.randperm(sum(pages) + 2, generator=generator).int()
        width = self.dc + self.dr
        cache = torch.full((len(order), self.block_size, width), torch.nan)
        table = torch.full((len(pages), max(pages)), 10**6, dtype=torch.int32)
        for b, (length, count) in enumerate(zip(self.lengths, pages, strict=True)):
            table[b, :count], order = order[:count], order[count:]
            rows = cache[table[b, :count].long()].flatten(0, 1)
            rows[:length] = draw(generator, length, width)
            cache[table[b, :count].long()] = rows.unflatten(0, (count, self.block_size))
        return {
            "q": draw(generator, len(pages), self.Tq, self.H, width).to(self.dtype),
            "kv_cache": cache.to(self.dtype),
            "block_table": table,
            "cache_seqlens": torch.tensor(self.lengths, dtype=torch.int32),
        }


def decode(cache: Cache, causal: bool = True, num_splits: int | None = None) -> Case:
    def call(inputs: Tensors, backend: str) -> dict[str, Tensor]:
        found = mla_decode(
            **inputs, head_dim_v=cache.dc, softmax_scale=0.2, causal=causal,
            num_splits=num_splits, return_lse=True, backend=backend,
        )  # fmt: skip
        return {"out": found[0], "lse": found[1].exp()}  # no key: 0

    words = [cache.name] + ["all"] * (not causal) + [f"{num_splits} splits"] * bool(num_splits)
    return Case("mla_decode", " ".join(words), cache.make, call)


def flash(cache: Cache) -> Case:
    def call(inputs: Tensors, backend: str) -> dict[str, Tensor]:
        q, k_cache, table, lengths = inputs.values()
        found = flash_mla_with_kvcache(
            q, k_cache.unsqueeze(2), table, lengths, cache.dc, backend=backend
        )
        return {"out": found[0], "lse": (-found[1]).exp()}

    return Case("flash_mla_with_kvcache", cache.name, cache.make, call, kernels="mla_decode")


def attention(
    dtype: torch.dtype,
    causal: bool = True,
    lengths: tuple[int, ...] = (),
    dr: int = 8,
    strided: bool = False,
) -> Case:
    """Sequences of these lengths packed, or else two of 21 tokens."""
    batch, T = (1, sum(lengths)) if lengths else (2, 21)
    shapes = {
        "q_nope": (batch, T, 3, 16),
        "q_rope": (batch, T, 3, dr),
        "kv_latent": (batch, T, 24),
        "k_rope": (batch, T, dr),
        "w_uk": (3, 16, 24),
        "w_uv": (3, 12, 24),
    }

    def make() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        inputs = {name: draw(generator, *shape).to(dtype) for name, shape in shapes.items()}
        if strided:
            inputs = {name: x.mT.contiguous().mT for name, x in inputs.items()}
        if lengths:
            inputs["cu_seqlens"] = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return inputs

    def call(inputs: Tensors, backend: str) -> dict[str, Tensor]:
        return {"out": mla_attention(**inputs, causal=causal, softmax_scale=0.05, backend=backend)}

    words = [f"{batch} x {T} x 3 x 16+{dr}", str(dtype).removeprefix("torch.")]
    words += ["all"] * (not causal) + ["packed"] * bool(lengths) + ["strided"] * strided
    return Case("mla_attention", " ".join(words), make, call, tuple(shapes))


def append(dtype: torch.dtype, interleaved: bool) -> Case:
    def make() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        slots = torch.randperm(40, generator=generator)[:11]
        slots[3] = -1
        return {
            "kv_latent": draw(generator, 11, 24).to(dtype),
            "k_rope": draw(generator, 11, 8).to(dtype),
            "kv_cache": draw(generator, 10, 4, 32).to(dtype),
            "slot_mapping": slots,
            "norm_weight": draw(generator, 24),
            "cos": draw(generator, 11, 4),
            "sin": draw(generator, 11, 4),
        }

    def call(inputs: Tensors, backend: str) -> dict[str, Tensor]:
        latent, key, cache, slots, weight, cos, sin = inputs.values()
        cache = cache.clone()
        mla_cache_append(
            latent, key, cache, slots,
            norm_weight=weight, cos=cos, sin=sin, rope_interleaved=interleaved, backend=backend,
        )  # fmt: skip
        return {"kv_cache": cache}

    words = [str(dtype).removeprefix("torch.")] + ["interleaved"] * interleaved
    return Case("mla_cache_append", " ".join(words), make, call)


def merge() -> Case:
    def make() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        parts = {f"out_{part}": draw(generator, 2, 3, 4, 5) for part in "ab"}
        return parts | {f"lse_{part}": draw(generator, 2, 4, 3) for part in "ab"}

    def call(inputs: Tensors, _: str) -> dict[str, Tensor]:
        out, lse = merge_attention_states(**inputs)
        return {"out": out, "lse": lse}

    names = ("out_a", "out_b", "lse_a", "lse_b")
    return Case("merge_attention_states", "2 x 3 x 4 x 5", make, call, names)


CASES = [
    *(attention(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    attention(torch.float32, causal=False, lengths=(9, 0, 17), dr=0),
    attention(torch.bfloat16, causal=False, strided=True),
    attention(torch.float16, lengths=(1, 20, 3)),
    *(decode(Cache(dtype=dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    decode(Cache((4, 21), Tq=4)),
    decode(Cache((4, 21), Tq=2, dtype=torch.bfloat16), causal=False),
    decode(Cache((70,), H=17, dc=16, dr=0, block_size=5), num_splits=3),
    flash(Cache()),
    append(torch.float32, interleaved=False),
    append(torch.bfloat16, interleaved=True),
    merge(),
]
