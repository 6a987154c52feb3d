"""Launchers of a block-diagonal product's Triton kernels, for tensors of any strides.

x [N, C, I], w [C, O, I], y [N, C, O]; where the blocks c lie side by side in memory, the kernels
for adjacent blocks serve.
"""

import functools
from collections.abc import Sequence
from operator import mul
from typing import Any

import torch
import triton
from torch import Tensor

from kexue_kernels import dispatch
from kexue_kernels.monarch.plan import (
    HALVES,
    PANEL,
    ROWS_INTERPRETED,
    Tile,
    gradients_tile,
    interpreted_tile,
    panel_tile,
    product_tile,
    resident_programs,
    resident_tile,
    split_rows,
    weights_tile,
)
from kexue_kernels.monarch.triton_monarch_product_kernel import (
    adjacent_product_kernel,
    block_product_kernel,
    resident_product_kernel,
)
from kexue_kernels.monarch.triton_monarch_weights_kernel import (
    adjacent_weights_kernel,
    block_gradients_kernel,
    block_weights_kernel,
)
from kexue_kernels.triton_common import launching_on, multiprocessors, precision

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
            **_constants(tile, 0 if kernel is block_product_kernel else None),
        )


def panels(x: Tensor, w: Tensor) -> Tensor:
    """As `product`, in panels [N / PANEL, C, O, PANEL] with rows fastest, for `from_panels`.

    Of rows that x doesn't have only those are written which that reads.
    """
    (N, C, I), O = x.shape, w.shape[1]
    y = x.new_empty(triton.cdiv(N, PANEL), C, O, PANEL)
    tile = interpreted_tile() if dispatch.interpreting() else panel_tile(O)
    m, o, i = tile.BLOCK_M, tile.BLOCK_O, tile.BLOCK_I
    tiles = [(x, (m, 1, i)), (w, (1, o, i)), (y[0].permute(2, 0, 1), (m, 1, o))]
    with launching_on(x):
        block_product_kernel[(triton.cdiv(N, m) * C * triton.cdiv(O, o),)](
            x,
            w,
            None,
            y,
            N,
            C,
            O,
            *strides(x),
            *strides(w),
            *(0, 0),
            *y.stride()[:3],
            I=I,
            COMPLEX=False,
            CONJUGATE=False,
            PRECISION="ieee",
            WIDE=wide(tiles),
            **_constants(tile, PANEL),
        )
    return y


def from_panels(x: Tensor, w: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """As `product`, resident weights; x in panels [N / PANEL, C, I, PANEL], y's blocks adjacent."""
    (N, C, O), I = y.shape, w.shape[2]
    tile = resident_tile(I)
    m, c, o, i = tile.BLOCK_M, tile.BLOCK_C, tile.BLOCK_O, tile.BLOCK_I
    tiles = [(x[0].permute(2, 0, 1), (m, c, i)), (w, (c, o, i)), (y, (m, c, o))]
    units = triton.cdiv(C, c) * triton.cdiv(O, o)
    programs = units * resident_programs(units, triton.cdiv(N, m), multiprocessors(x.device))
    with launching_on(x):
        resident_product_kernel[(programs,)](
            x,
            w,
            bias,
            y,
            N,
            C,
            O,
            *x.stride()[:3],
            *strides(w),
            *((0, 0) if bias is None else strides(bias)),
            *strides(y),
            I=I,
            PANEL=PANEL,
            WIDE=wide(tiles),
            **_constants(tile),
        )


def weights_gradient(g: Tensor, x: Tensor) -> Tensor:
    """dw[c, o, i] = sum over m of g[m, c, o] conj(x[m, c, i]), contiguous, in the data's dtype."""
    (N, C, O), I = g.shape, x.shape[2]
    beside = max(adjacent(x), adjacent(g))
    tile = weights_tile(x.dtype, O, I, beside, shared_memory(x.device))
    if dispatch.interpreting():
        tile = interpreted_tile(beside)
    kernel = block_weights_kernel if tile.BLOCK_C == 1 else adjacent_weights_kernel
    m, c, o, i = tile.BLOCK_M, tile.BLOCK_C, tile.BLOCK_O, tile.BLOCK_I
    programs = triton.cdiv(C, c) * triton.cdiv(O, o) * triton.cdiv(I, i)
    split, splits = _splits(N, programs, x.device)
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
    return _summed(partial, x.dtype)


def gradients(g: Tensor, w: Tensor, x: Tensor, dx: Tensor) -> Tensor:
    """Of `product`, g [N, C, O] arriving: dx [N, C, I] is written, dw returned."""
    (N, C, O), I = g.shape, x.shape[2]
    whole = all(n % 16 == 0 for n in (O, I, x.stride(0), g.stride(0)))
    tile = gradients_tile(x.dtype, O, I, shared_memory(x.device), whole)
    if tile is None or max(adjacent(x), adjacent(g)) > 1:
        product(g, w.mT, None, dx, conjugate=True)
        return weights_gradient(g, x)
    if dispatch.interpreting():
        tile = tile._replace(BLOCK_M=32)
    m, o, i = tile.BLOCK_M, tile.BLOCK_O, tile.BLOCK_I
    split, splits = _splits(N, C, x.device)
    partial = torch.empty((splits, C, O, I), dtype=torch.float32, device=x.device)
    tiles = [(g, (m, 1, o)), (w, (1, o, i)), (x, (m, 1, i)), (dx, (m, 1, i))]
    with launching_on(x):
        block_gradients_kernel[(C * splits,)](
            g,
            w,
            x,
            dx,
            partial,
            N,
            C,
            *strides(g),
            *strides(w),
            *strides(x),
            *strides(dx),
            *strides(partial),
            O=O,
            I=I,
            SPLIT=split,
            WIDE=wide(tiles),
            **_constants(tile),
        )
    return _summed(partial, x.dtype)


def _splits(rows: int, programs: int, device: torch.device) -> tuple[int, int]:
    """Rows of a split, and splits."""
    split = ROWS_INTERPRETED
    if not dispatch.interpreting():
        split = split_rows(rows, programs, multiprocessors(device))
    return split, triton.cdiv(rows, split)


def _summed(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """[splits, ...], added in order."""
    return (partial[0] if partial.shape[0] == 1 else partial.sum(0)).to(dtype)


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


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have; 0 where a CPU stands in for the GPU."""
    if device.type != "cuda":
        return 0
    utils = triton.runtime.driver.active.utils
    found: int = utils.get_device_properties(device.index)["max_shared_mem"]
    return found


def _constants(tile: Tile, panel: int | None = None) -> dict[str, Any]:
    """Constant arguments, and the launch's options."""
    found = tile._asdict() | ({} if panel is None else {"PANEL": panel})
    if tile.BLOCK_C == 1:
        del found["BLOCK_C"]
    return found
