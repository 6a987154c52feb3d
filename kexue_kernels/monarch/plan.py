"""Which kernels serve a Monarch product on a GPU, and in what tiles: rules in pure Python.

Three ways, told apart by where z, what passes between the factors, goes:

    fused: one kernel has all l-blocks of a tile of rows. x is read and y written once.
    split: the same kernel, a program having 16 of the l-blocks: x is read once per group, from L2
        but for the first time.
    two: a kernel per factor, z in memory. No permutation copy: the second reads z, and writes y,
        16 adjacent l at a time, which are whole sectors.

An element of z in the first two stays in registers and shared memory, where half precision alone
has room for it.
"""

from typing import NamedTuple

import torch

HALVES = (torch.bfloat16, torch.float16)


class Shape(NamedTuple):
    """x [rows, k*p], w1 [k, q, p], w2 [l, s, r]."""

    rows: int
    k: int
    q: int
    p: int
    l: int
    s: int
    r: int
    dtype: torch.dtype


class Tile(NamedTuple):
    """Of y[m, c, o] = sum over i of x[m, c, i] w[c, o, i], as its kernels name them."""

    BLOCK_M: int
    BLOCK_O: int
    BLOCK_I: int
    BLOCK_C: int  # adjacent blocks; 1: the kernel for a block per program
    num_warps: int
    num_stages: int


class FusedTile(NamedTuple):
    BLOCK_M: int
    BLOCK_A: int
    BLOCK_C: int
    BLOCK_I: int
    BLOCK_O: int
    num_warps: int
    num_stages: int


class Rates(NamedTuple):
    """What a pass costs: an H200's. Other devices have much the same ratios."""

    memory: float = 4.3e12  # bytes/s
    l2: float = 5.5e12  # bytes/s
    launch: float = 3e-6  # s


_H200 = Rates()


class Plan(NamedTuple):
    path: str  # "fused", "split" or "two"
    seconds: float


FUSED = FusedTile(64, 16, 16, 32, 32, 8, 1)
FUSED_INTERPRETED = FUSED._replace(BLOCK_A=8)
ROWS_INTERPRETED = 64  # of a split


def plan(shape: Shape, rates: Rates = _H200) -> Plan:
    """The cheapest way."""
    return min(costs(shape, rates), key=lambda each: each.seconds)


def costs(shape: Shape, rates: Rates = _H200) -> list[Plan]:
    """Every way that can serve `shape`."""
    found = [Plan("two", _two(shape, rates))]
    if fusable(shape):
        groups = -(-shape.l // FUSED.BLOCK_C)
        found.append(Plan("split" if groups > 1 else "fused", _one(shape, groups, rates)))
    return found


def fusable(shape: Shape) -> bool:
    """Whether the fused kernel serves, with whole vectors: z[b, k, q] is z[b, r, l] as it is."""
    square = shape.q == shape.l
    whole = all(n % 16 == 0 for n in (shape.k, shape.l, shape.p, shape.s))
    fits = shape.p <= FUSED.BLOCK_I and shape.s <= FUSED.BLOCK_O
    return shape.dtype in HALVES and square and whole and fits


def _one(shape: Shape, groups: int, rates: Rates) -> float:
    x, z, y, w1, w2 = _sizes(shape)
    del z
    tiles = -(-shape.rows // FUSED.BLOCK_M)
    memory = x + y + w1 + w2
    l2 = groups * x + y + tiles * (w1 + w2)
    return max(memory / rates.memory, l2 / rates.l2) + rates.launch


def _two(shape: Shape, rates: Rates) -> float:
    x, z, y, w1, w2 = _sizes(shape)
    seconds = 0.0
    for source, weights, result, out, tile in (
        (x, w1, z, shape.q, product_tile(shape.dtype, shape.q)),
        (z, w2, y, shape.s, product_tile(shape.dtype, shape.s, shape.l)),
    ):
        tiles = -(-shape.rows // tile.BLOCK_M)
        l2 = -(-out // tile.BLOCK_O) * source + tiles * weights + result
        memory = source + weights + result
        seconds += max(memory / rates.memory, l2 / rates.l2) + rates.launch
    return seconds


def _sizes(shape: Shape) -> tuple[int, int, int, int, int]:
    """Bytes of x, z, y, w1 and w2."""
    rows, k, q, p, l, s, r, dtype = shape
    elements = rows * k * p, rows * k * q, rows * s * l, k * q * p, l * s * r
    x, z, y, w1, w2 = (n * dtype.itemsize for n in elements)
    return x, z, y, w1, w2


def product_tile(dtype: torch.dtype, O: int, adjacent: int = 1, whole: bool = True) -> Tile:
    """For blocks with O outputs, of which `adjacent` lie side by side in memory.

    Adjacent ones are taken as many as make a sector of 32 bytes. `whole`: in whole vectors, where
    offsets and masks leave registers for twice the rows.
    """
    if dtype in HALVES:
        if adjacent == 1:
            if O <= 32:
                return Tile(128, 32, 32, 1, 4, 2)
            return Tile(128, 64, 64, 1, 4, 2) if O <= 64 else Tile(128, 128, 64, 1, 8, 2)
        if adjacent <= 4:
            return Tile(64, 32, 32, 4, 4, 1)
        return Tile(64, 32, 32, 16, 16, 1) if whole else Tile(32, 16, 16, 16, 8, 1)
    if dtype.is_complex:
        return Tile(32, 16, 16, 1, 4, 2) if adjacent == 1 else Tile(16, 16, 16, 4, 4, 1)
    return Tile(64, 32, 16, 1, 4, 2) if adjacent == 1 else Tile(16, 32, 16, 8, 8, 1)


def weights_tile(dtype: torch.dtype, O: int, I: int, adjacent: int = 1) -> Tile:
    """For dw[c, o, i] = sum over m of g[m, c, o] conj(x[m, c, i])."""
    if dtype in HALVES:
        if adjacent == 1:
            wide = max(O, I) > 32
            return Tile(64, 64, 64, 1, 4, 2) if wide else Tile(64, 32, 32, 1, 4, 2)
        return Tile(32, 32, 32, 4, 4, 1) if adjacent <= 4 else Tile(16, 32, 32, 16, 8, 2)
    if dtype.is_complex:
        return Tile(16, 16, 16, 1, 4, 1) if adjacent == 1 else Tile(16, 16, 16, 4, 4, 1)
    return Tile(16, 32, 32, 1, 4, 2) if adjacent == 1 else Tile(16, 16, 32, 8, 8, 1)


def interpreted_tile(adjacent: int = 1) -> Tile:
    """For Triton's interpreter, where a program takes as long whatever its tile's size."""
    return Tile(32, 16, 16, 4 if adjacent > 1 else 1, 1, 1)


def split_rows(rows: int, programs: int, multiprocessors: int) -> int:
    """How many rows one program of a weights' gradient adds up: a power of two.

    As many programs as keep a device busy, each with enough rows to be worth its partial sum.
    """
    splits = max(1, 8 * multiprocessors // programs)
    return max(256, 1 << (-(-rows // splits) - 1).bit_length())
