"""A kernel that is not shipped, for the tests of `inspect`."""

import tempfile
from pathlib import Path

import triton
import triton.language as tl

from kexue_kernels.offline import TritonCase, cubins
from kexue_kernels.offline import triton as triton_kernels
from kexue_kernels.offline.archs import ARCHS
from kexue_kernels.offline.card import Card


@triton.jit
def decayed_sum(a, b, h, L, D, BLOCK: tl.constexpr):
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for t in range(L):
        at = t.to(tl.int64) * D + d
        total = tl.exp(tl.load(a + at, d < D)) * total + tl.load(b + at, d < D)
        tl.store(h + at, total, d < D)


@triton.jit
def matmul(a, b, c, K, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, K, BLOCK):
        rows = tl.load(a + i[:, None] * K + k + i[None, :])
        columns = tl.load(b + (k + i[:, None]) * BLOCK + i[None, :])
        total = tl.dot(rows, columns, total)
    tl.store(c + i[:, None] * BLOCK + i[None, :], total)


def case(kernel: str, pointers: str, sizes: str, **options: object) -> TritonCase:
    signature = dict.fromkeys(pointers, "*fp32") | dict.fromkeys(sizes, "i32")
    signature |= {"BLOCK": "constexpr"}
    defaults = {
        "op": "example",
        "name": kernel,
        "kernel": f"{__name__}:{kernel}",
        "signature": signature,
        "constexprs": {"BLOCK": 512},
        "num_warps": 4,
        "num_stages": 2,
        "bytes_per_element": 12.0,
        "flops_per_element": 2.0,
        "divisible_by_16": tuple(pointers + sizes),
    }
    return TritonCase(**defaults | options)  # type: ignore[arg-type]


def compile_cases() -> list[TritonCase]:
    halves = {"a": "*bf16", "b": "*bf16", "c": "*fp32", "K": "i32", "BLOCK": "constexpr"}
    return [
        case("decayed_sum", "abh", "LD"),
        case("matmul", "abc", "K", name="tiled", signature=halves, constexprs={"BLOCK": 64}),
        case(
            *("matmul", "abc", "K"),
            name="crowded",
            signature=halves,
            constexprs={"BLOCK": 128},
            num_warps=2,
        ),
        case("decayed_sum", "abh", "LD", name="broken", constexprs={"BLOCK": 3}),
    ]


def cubin_cards(arch: str) -> list[Card]:
    """`decayed_sum` as if it had been found in the extension."""
    kernel = triton_kernels._compile(compile_cases()[0], ARCHS[arch])
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        return cubins.cards(arch, cubin)
