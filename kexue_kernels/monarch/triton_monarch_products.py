"""Launchers of a block-diagonal product's Triton kernels, for tensors of any strides.

x [N, C, I], w [C, O, I], y [N, C, O]; where the blocks c lie side by side in memory, the kernels
for adjacent blocks serve.
"""

from collections.abc import Sequence
from operator import mul
from typing import Any

import torch
import triton
from torch import Tensor

from kexue_kernels import dispatch
from kexue_kernels.monarch.plan import (
    HALVES,
    ROWS_INTERPRETED,
    Tile,
    interpreted_tile,
    product_tile,
    split_rows,
    weights_tile,
)
from kexue_kernels.monarch.triton_monarch_product_kernel import (
    adjacent_product_kernel,
    block_product_kernel,
)
from kexue_kernels.monarch.triton_monarch_weights_kernel import (
    adjacent_weights_kernel,
    block_weights_kernel,
)
from kexue_kernels.triton_common import launching_on, multiprocessors

_NARROW = 2**31


def product(
    x: Tensor, w: Tensor, bias: Tensor | None, y: Tensor, *, conjugate: bool = False
) -> None:
    """y[m, c, o] = sum over i of x[m, c, i] w[c, o, i] + bias[c, o], w conjugated if asked."""
    (N, C, I), O = x.shape, w.shape[1]
    beside = max(adjacent(x), adjacent(y))
    whole = all(n % 16 == 0 for n in (C, O, I, x.stride(0)))
    tile = product_tile(x.dtype, O, beside, whole)
    if dispatch.interpreting():
        tile = interpreted_tile(beside)
    kernel = block_product_kernel if tile.BLOCK_C == 1 else adjacent_product_kernel
    m, c, o, i = tile.BLOCK_M, tile.BLOCK_C, tile.BLOCK_O, tile.BLOCK_I
    tiles = [(x, (m, c, i)), (w, (c, o, i)), (y, (m, c, o))]
    programs = triton.cdiv(N, m) * triton.cdiv(C, c) * triton.cdiv(O, o)
    with launching_on(x):
        kernel[(programs,)](
            real(x),
            real(w),
            None if bias is None else real(bias),
            real(y),
            N,
            C,
            O,
            *strides(x),
            *strides(w),
            *((0, 0) if bias is None else strides(bias)),
            *strides(y),
            I=I,
            COMPLEX=x.is_complex(),
            CONJUGATE=conjugate,
            PRECISION=precision(x.dtype),
            WIDE=wide(tiles),
            **_constants(tile),
        )


def weights_gradient(g: Tensor, x: Tensor) -> Tensor:
    """dw[c, o, i] = sum over m of g[m, c, o] conj(x[m, c, i]), contiguous, in the data's dtype."""
    (N, C, O), I = g.shape, x.shape[2]
    beside = max(adjacent(x), adjacent(g))
    tile = weights_tile(x.dtype, O, I, beside)
    if dispatch.interpreting():
        tile = interpreted_tile(beside)
    kernel = block_weights_kernel if tile.BLOCK_C == 1 else adjacent_weights_kernel
    m, c, o, i = tile.BLOCK_M, tile.BLOCK_C, tile.BLOCK_O, tile.BLOCK_I
    programs = triton.cdiv(C, c) * triton.cdiv(O, o) * triton.cdiv(I, i)
    split = ROWS_INTERPRETED
    if not dispatch.interpreting():
        split = split_rows(N, programs, multiprocessors(x.device))
    splits = triton.cdiv(N, split)
    state = torch.float32 if x.dtype in HALVES else x.dtype
    partial = torch.empty((splits, C, O, I), dtype=state, device=x.device)
    tiles = [(g, (m, c, o)), (x, (m, c, i)), (partial[0], (c, o, i))]
    with launching_on(x):
        kernel[(programs * splits,)](
            real(g),
            real(x),
            real(partial),
            N,
            C,
            O,
            I,
            *strides(g),
            *strides(x),
            *strides(partial),
            SPLIT=split,
            COMPLEX=x.is_complex(),
            PRECISION=precision(x.dtype),
            WIDE=wide(tiles),
            **_constants(tile),
        )
    return (partial[0] if splits == 1 else partial.sum(0)).to(x.dtype)


def adjacent(x: Tensor) -> int:
    """Of x [N, C, I]: how many blocks' numbers lie side by side; 1 where those of a block do."""
    _, C, I = x.shape
    return C if C > 1 and x.stride(1) < (x.stride(2) if I > 1 else _NARROW) else 1


def real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def strides(x: Tensor) -> tuple[int, ...]:
    """In real numbers."""
    parts = 2 if x.is_complex() else 1
    return tuple(parts * stride for stride in x.stride())


def wide(tiles: Sequence[tuple[Tensor, tuple[int, ...]]]) -> bool:
    """Whether offsets in a tile of one of these tensors need 64 bits.

    The interpreter takes its time over narrower ones, as it looks for overflows.
    """
    ends = (sum(map(mul, tile, strides(x))) for x, tile in tiles)
    return dispatch.interpreting() or max(ends) >= _NARROW


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: exactly, unless PyTorch's matrix products may be TF32."""
    if dtype in HALVES or torch.version.hip is not None:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    allowed = getattr(matmul, "fp32_precision", None)
    if allowed is None:  # before PyTorch 2.9
        return "tf32" if matmul.allow_tf32 else "ieee"
    return "tf32" if allowed == "tf32" else "ieee"


def _constants(tile: Tile) -> dict[str, Any]:
    """Constant arguments, and the launch's options."""
    found = tile._asdict()
    if tile.BLOCK_C == 1:
        del found["BLOCK_C"]
    return found
