"""mla_cache_append on GPUs with Triton: a program for each token."""

import torch
import triton
from torch import Tensor

from kexue_kernels.mla.fp8 import row_bytes
from kexue_kernels.mla.triton_mla_cache_append_kernel import append_kernel
from kexue_kernels.offline import TritonCase
from kexue_kernels.triton_common import launching_on


def configure(dc: int) -> tuple[int, int]:
    """BLOCK_C and num_warps: four channels to a thread, if they are so many."""
    BLOCK_C = max(16, triton.next_power_of_2(dc))
    return BLOCK_C, min(8, max(1, BLOCK_C // 128))


def append(
    kv_latent: Tensor,
    k_rope: Tensor,
    pages: Tensor,
    slot_mapping: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    rope_interleaved: bool,
) -> None:
    (T, dc), dr = kv_latent.shape, k_rope.shape[1]
    BLOCK_C, num_warps = configure(dc)
    with launching_on(pages):
        append_kernel[(T,)](
            kv_latent, k_rope, pages, slot_mapping, norm_weight, cos, sin,
            dc, dr, pages.shape[0] * pages.shape[1], pages.shape[1], norm_eps,
            *kv_latent.stride(), *k_rope.stride(), *pages.stride(),
            1 if norm_weight is None else norm_weight.stride(0),
            *((0, 0) if cos is None else cos.stride()), *((0, 0) if sin is None else sin.stride()),
            INTERLEAVED=rope_interleaved, BLOCK_C=BLOCK_C,
            BLOCK_R=max(1, triton.next_power_of_2(dr)),
            BLOCK_H=max(1, triton.next_power_of_2(dr // 2)), FP8=pages.dtype == torch.uint8,
            num_warps=num_warps,
        )  # fmt: skip


# ---- what is compiled offline


def compile_cases() -> list[TritonCase]:
    return [_case("bf16", True), _case("fp32", False), _case("bf16", True, fp8=True)]


def _case(data: str, options: bool, fp8: bool = False) -> TritonCase:
    """A row of 512 + 64; with all options, or a copy."""
    BLOCK_C, num_warps = configure(512)
    arguments: dict[str, object] = {f"{x}_ptr": f"*{data}" for x in ("latent", "rope")}
    arguments |= {"pages_ptr": "*u8" if fp8 else f"*{data}", "slot_ptr": "*i64"}
    arguments |= {f"{x}_ptr": "*fp32" if options else None for x in ("weight", "cos", "sin")}
    arguments |= {"dc": "i32", "dr": "i32", "slots": "i64", "block_size": "i32", "eps": "fp32"}
    for name, axes in {"latent": "tc", "rope": "tr", "page": "bpc"}.items():
        arguments |= {f"stride_{name}_{axis}": "i32" for axis in axes}
        arguments[f"stride_{name}_{axes[-1]}"] = 1
    arguments |= {"stride_weight": 1}
    for name in ("cos", "sin"):
        arguments |= {f"stride_{name}_t": "i32" if options else 0}
        arguments |= {f"stride_{name}_r": 1 if options else 0}
    arguments |= {"INTERLEAVED": options, "BLOCK_C": BLOCK_C, "BLOCK_R": 64, "BLOCK_H": 32}
    arguments |= {"FP8": fp8}
    types = {k: t for k, t in arguments.items() if isinstance(t, str)}
    size = 4 if data == "fp32" else 2
    return TritonCase(
        op="mla_cache_append",
        name=f"{data}" + "-plain" * (not options) + "-fp8" * fp8,
        kernel=f"{__name__}_kernel:append_kernel",
        signature={k: types.get(k, "constexpr") for k in arguments},
        constexprs={k: value for k, value in arguments.items() if k not in types},
        num_warps=num_warps,
        num_stages=1,
        bytes_per_element=size + (row_bytes(512, 64) / 576 if fp8 else size),
        flops_per_element=4 if options else 0,
        divisible_by_16=tuple(
            k
            for k, t in types.items()
            if t[0] == "*" or k in ("dc", "dr") or k.startswith("stride")
        ),
    )
