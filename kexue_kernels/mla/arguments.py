"""Checks that the functions of the mla family share."""

import torch
from torch import Tensor

from kexue_kernels import autocast, checks, options
from kexue_kernels.mla import fp8


def pages(
    kv_cache: Tensor, dc: int, dr: int, like: Tensor, owner: str, name: str = "kv_cache"
) -> Tensor:
    """kv_cache as [num_blocks, block_size, dc + dr], or uint8 rows of fp8.py, after checking it."""
    checks.tensor(name, kv_cache)
    if kv_cache.dtype in fp8.DTYPES:
        if like.dtype != torch.bfloat16:
            dtype = str(like.dtype).removeprefix("torch.")
            raise ValueError(
                f"{owner}: expected dtype bfloat16 beside a {name} of bytes, got {dtype}"
            )
        width, row = fp8.checked_row_bytes(name, dc, dr), "dc + dc/32 + 2 dr"
    else:
        width, row = dc + dr, "dc + dr"
        checks.dtype(name, kv_cache, (like.dtype,))
    checks.device(name, kv_cache, like.device, owner)
    axes = f"[num_blocks, block_size, {row}]"
    if kv_cache.ndim == 4:
        axes = f"[num_blocks, block_size, 1, {row}]"
        expected = (*kv_cache.shape[:2], 1, width)
    else:
        checks.ndim(name, kv_cache, 3, f"{axes} or [num_blocks, block_size, 1, {row}]")
        expected = (*kv_cache.shape[:2], width)
    checks.shape(name, kv_cache, expected, axes)
    if kv_cache.shape[1] < 1:
        raise ValueError(f"{name}: expected block_size of at least 1, got {list(kv_cache.shape)}")
    return fp8.as_bytes(kv_cache if kv_cache.ndim == 3 else kv_cache.squeeze(2))


def rows_aligned(pages: Tensor) -> None:
    """Of rows of bytes: kernels read their scales as they lie, 4 bytes at once."""
    if pages.dtype != torch.uint8:
        return
    steps = pages.storage_offset(), *(pages.stride(i) for i in (0, 1) if pages.shape[i] > 1)
    if pages.stride(2) != 1 or any(step % 4 for step in steps):
        raise ValueError(
            "kv_cache: expected the bytes of a row side by side and rows at multiples of 4 bytes, "
            f"got strides {pages.stride()} and offset {pages.storage_offset()}"
        )


def in_cache_dtype(q: Tensor, kv_cache: Tensor) -> Tensor:
    """Under autocast, q in the dtype of the cache, which is not to be copied."""
    dtype = fp8.dtype_of(kv_cache)
    return q.to(dtype) if q.dtype != dtype and autocast.enabled(q.device.type) else q


def tables(block_table: Tensor, cache_seqlens: Tensor, B: int, like: Tensor, owner: str) -> None:
    """Kind, shape and device; `values_in_reach` checks the rest."""
    for name, value in (("block_table", block_table), ("cache_seqlens", cache_seqlens)):
        checks.tensor(name, value)
        checks.dtype(name, value, checks.INDEX)
        checks.device(name, value, like.device, owner)
    checks.ndim("block_table", block_table, 2, "[B, max_blocks]")
    checks.shape("block_table", block_table, (B, block_table.shape[1]), "[B, max_blocks]")
    checks.shape("cache_seqlens", cache_seqlens, (B,), "[B]")


def values_in_reach(block_table: Tensor, cache_seqlens: Tensor, pages: Tensor) -> None:
    """Reads lengths and the page ids they reach: on CPU, where that needs no synchronisation."""
    if cache_seqlens.device.type != "cpu" or cache_seqlens.numel() == 0:
        return
    num_blocks, block_size = pages.shape[:2]
    reach = block_table.shape[1] * block_size
    least, most = (int(x) for x in torch.aminmax(cache_seqlens))
    if least < 0 or most > reach:
        raise ValueError(
            f"cache_seqlens: expected lengths from 0 to {reach} (block_table has "
            f"{block_table.shape[1]} columns of {block_size} tokens), "
            f"got {least if least < 0 else most}"
        )
    used = (cache_seqlens.long() + block_size - 1) // block_size
    ids = block_table[torch.arange(block_table.shape[1]) < used[:, None]]
    wrong = ids[(ids < 0) | (ids >= num_blocks)]
    if wrong.numel():
        raise ValueError(
            f"block_table: expected ids from 0 to {num_blocks - 1} (kv_cache's blocks) for the "
            f"tokens of cache_seqlens, got {int(wrong[0])}"
        )


def slots_in_reach(slot_mapping: Tensor, pages: Tensor) -> None:
    """Reads the slots: on CPU."""
    if slot_mapping.device.type != "cpu" or slot_mapping.numel() == 0:
        return
    slots = pages.shape[0] * pages.shape[1]
    least, most = (int(x) for x in torch.aminmax(slot_mapping))
    if least < -1 or most >= slots:
        raise ValueError(
            f"slot_mapping: expected slots from 0 to {slots - 1}, or -1, "
            f"got {least if least < -1 else most}"
        )


def norm_eps(value: object) -> None:
    options.finite("norm_eps", value)
    assert isinstance(value, int | float)
    if value < 0:
        raise ValueError(f"norm_eps: expected a number from 0 on, got {value}")


def for_inference(op: str, *tensors: Tensor | None) -> None:
    if checks.recorded(*tensors):
        raise RuntimeError(
            f"{op} is for inference, but an input requires grad: call it under torch.no_grad(), or "
            "detach its inputs"
        )
