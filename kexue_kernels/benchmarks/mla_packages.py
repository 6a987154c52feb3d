"""Other packages' decoding over a paged cache of latents, for GPUs.

What each prepares before a call (a plan, a table in its own form) is not timed.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from kexue_kernels.benchmarks.case import Contestant, Function, Inputs
from kexue_kernels.benchmarks.mla_peers import DC, SCALE

FLAG_GEMS = "flag-gems"
FLASHINFER = "flashinfer"
WORKSPACE = 128 * 2**20  # bytes that flashinfer asks for

Arguments = tuple[Any, ...]


def flag_gems(Tq: int) -> Contestant:
    """Its Triton `flash_mla`. `approximate`: it has a scale of its own, which q makes up for."""

    def load() -> Function:
        function: Function = importlib.import_module("flag_gems.fused.flash_mla").flash_mla
        return function

    def prepare(inputs: Inputs) -> Arguments:
        q, cache, table = inputs["q"], inputs["kv_cache"], inputs["block_table"]
        B, Tq, H, width = q.shape
        page = cache.shape[1]
        scaled = q * (SCALE * width**0.5)
        longest, lengths = table.shape[1] * page, inputs["cache_seqlens"]
        return (
            scaled, table, cache[:, :, None], longest, page, B, Tq, lengths, H, 1, width, DC, True,
        )  # fmt: skip

    return Contestant(
        FLAG_GEMS,
        load,
        package="flag_gems",
        unfit="" if Tq == 1 else "takes one query a sequence",
        approximate=True,
        slow=True,
        prepare=prepare,
        to_case=lambda out: out.reshape(-1, Tq, *out.shape[-2:]),
    )


def flashinfer(Tq: int) -> Contestant:
    """Its planned wrapper, compiled at its first call."""

    def load() -> Function:
        return lambda wrapper, *tensors: wrapper.run(*tensors)

    return Contestant(
        FLASHINFER,
        load,
        package="flashinfer",
        approximate=True,
        slow=True,
        prepare=_plan,
        to_case=lambda out: out.reshape(-1, Tq, *out.shape[-2:]),
    )


def _plan(inputs: Inputs) -> Arguments:
    """The wrapper, then q's and the cache's two parts; queries packed, [B Tq, H, ..]."""
    module = importlib.import_module("flashinfer.mla")
    q, cache, table = inputs["q"], inputs["kv_cache"], inputs["block_table"]
    B, Tq, H, width = q.shape
    workspace = torch.empty(WORKSPACE, dtype=torch.int8, device=q.device)
    wrapper = module.BatchMLAPagedAttentionWrapper(workspace)
    count = torch.arange(B + 1, dtype=torch.int32, device=q.device)
    wrapper.plan(
        count * Tq, count * table.shape[1], table.flatten(), inputs["cache_seqlens"],
        H, DC, width - DC, cache.shape[1], True, SCALE, q.dtype, cache.dtype,
    )  # fmt: skip
    return wrapper, *_parts(q.flatten(0, 1)), *_parts(cache)


def _parts(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., :DC].contiguous(), x[..., DC:].contiguous()
