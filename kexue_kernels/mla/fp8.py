"""Cached rows of bytes, their latents 8-bit floats: FlashMLA's 656 bytes for 512 + 64 channels.

A row is dc codes in float8_e4m3fn, a float32 scale for each 128 of them, and dr bfloat16 of the
key. What it stands for is code times scale, rounded to bfloat16, and the key.

Source: DeepSeek-AI, FlashMLA, "FP8 KV Cache" in its README; the format of codes: Micikevicius et
al., "FP8 Formats for Deep Learning" (2022), table 1.
"""

import torch
from torch import Tensor

TILE = 128  # channels to a scale
LARGEST = 448.0  # that a code stands for
SMALLEST = 2.0**-100  # scale: its reciprocal is finite
DTYPES = (torch.uint8, torch.float8_e4m3fn)  # of a cache with such rows


def row_bytes(dc: int, dr: int) -> int:
    """dc codes, their scales, dr bfloat16."""
    return dc + dc // TILE * 4 + 2 * dr


def checked_row_bytes(name: str, dc: int, dr: int) -> int:
    """`row_bytes`; an error names the argument `name`."""
    if dc % TILE or dr % 2:
        raise ValueError(
            f"{name}: expected dc a multiple of {TILE} and dr an even number for rows of bytes, "
            f"got dc = {dc} and dr = {dr}"
        )
    return row_bytes(dc, dr)


def dtype_of(kv_cache: Tensor) -> torch.dtype:
    """Of the numbers in a cache."""
    return torch.bfloat16 if kv_cache.dtype in DTYPES else kv_cache.dtype


def as_bytes(kv_cache: Tensor) -> Tensor:
    """uint8 where the rows are bytes; any other cache as it is."""
    return kv_cache.view(torch.uint8) if kv_cache.dtype in DTYPES else kv_cache


def numbers(rows: Tensor, dc: int, dtype: torch.dtype) -> Tensor:
    """[..., dc + dr] in `dtype`, of rows [..., dc + dr] of numbers or [..., row_bytes] of bytes."""
    return (unpack(rows, dc) if rows.dtype == torch.uint8 else rows).to(dtype)


def pack(latent: Tensor, key: Tensor) -> Tensor:
    """uint8 [..., row_bytes] of latent [..., dc] and key [..., dr].

    A scale is its tile's largest magnitude / 448: the largest code is reached in every tile.
    """
    tiles = latent.float().unflatten(-1, (-1, TILE))
    scales = (tiles.abs().amax(-1) / LARGEST).clamp_min(SMALLEST)  # NaN where the tile has one
    codes = (tiles * scales.reciprocal()[..., None]).flatten(-2).to(torch.float8_e4m3fn)
    parts = codes, scales, key.to(torch.bfloat16)
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], -1)


def unpack(rows: Tensor, dc: int) -> Tensor:
    """bfloat16 [..., dc + dr] of rows, uint8 [..., row_bytes]."""
    sizes = dc, dc // TILE * 4, rows.shape[-1] - dc - dc // TILE * 4
    codes, scales, key = (part.contiguous() for part in rows.split(sizes, -1))
    every = torch.arange(256, dtype=torch.uint8, device=rows.device)
    numbers = every.view(torch.float8_e4m3fn).float()  # looked up: faster than converting, on CPUs
    tiles = numbers.index_select(0, codes.flatten().int()).view(*rows.shape[:-1], dc // TILE, TILE)
    latent = (tiles * scales.view(torch.float32)[..., None]).flatten(-2).to(torch.bfloat16)
    return torch.cat([latent, key.view(torch.bfloat16)], -1)
