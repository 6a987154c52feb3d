"""Which kernels serve a Monarch product on a GPU, and in what tiles: rules in pure Python.

Three ways, told apart by where z, what passes between the factors, goes:

    fused: one kernel has all l-blocks of a tile of rows. x is read and y written once.
    split: the same kernel, a program having some of the l-blocks: x is read once per group, from
        L2 but for the first time.
    two: a kernel per factor, z in memory. No permutation copy: the second writes y 16 adjacent l
        at a time, which are whole sectors.

An element of z in the first two stays in registers and shared memory, where half precision alone
has room for it.

A program needs its blocks of the factors for every tile of rows. Where a multiprocessor's shared
memory holds them (`resident`), it fetches them once and takes tile after tile; else they come from
L2 each time, and larger tiles mean fewer times.

On Hopper there is a fourth way, the CUDA backend's, which only a call that asks for it takes:

    cluster: one kernel, several thread blocks of which exchange z through each other's shared
        memory. x is read and y written once; the factors are resident, or streamed from L2.
"""

import functools
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
    multiprocessors: int = 132


_H200 = Rates()


class Plan(NamedTuple):
    path: str  # "fused", "split", "two" or "cluster"
    resident: bool  # the one kernel's factors, or the second kernel's
    seconds: float


FUSED = FusedTile(64, 16, 16, 32, 32, 8, 1)
FUSED_INTERPRETED = FUSED._replace(BLOCK_A=8)
ROWS_INTERPRETED = 64  # of a split

# One program fills a multiprocessor: 128 KiB of factors, and the rows on their way.
RESIDENT_SHARED = 226 * 1024  # bytes; Hopper and the larger Blackwell have 227 KiB
WIDE_SHARED = 128 * 1024  # bytes; A100s have 163 KiB
RESIDENT_FUSED = FusedTile(16, 32, 32, 32, 32, 16, 3)
PANEL = 256  # rows of z that lie together, between kernels of which the second is resident


@functools.lru_cache(1024)
def plan(shape: Shape, shared: int = 0, vectors: bool = True, rates: Rates = _H200) -> Plan:
    """The cheapest way for rows that lie in whole `vectors`, or don't."""
    found = costs(shape, shared, rates)
    return min(found if vectors else [each for each in found if each.path == "two"], key=_seconds)


def _seconds(plan: Plan) -> float:
    return plan.seconds


def costs(shape: Shape, shared: int = 0, rates: Rates = _H200) -> list[Plan]:
    """Every way that can serve `shape` where a program may have `shared` bytes of shared memory.

    With none, the ways that every device has.
    """
    found = [Plan("two", False, _two(shape, None, rates))]
    if fusable(shape):
        found.append(_one(shape, FUSED, rates))
    if shared >= RESIDENT_SHARED:
        if keepable(shape):
            found.append(Plan("two", True, _two(shape, resident_tile(shape.r), rates)))
        if fusable(shape) and 16 < shape.k <= RESIDENT_FUSED.BLOCK_A and shape.l > 16:
            found.append(_one(shape, RESIDENT_FUSED, rates))
    return found


def fusable(shape: Shape) -> bool:
    """Whether the fused kernel serves, with whole vectors: z[b, k, q] is z[b, r, l] as it is."""
    square = shape.q == shape.l
    whole = all(n % 16 == 0 for n in (shape.k, shape.l, shape.p, shape.s))
    fits = shape.p <= FUSED.BLOCK_I and shape.s <= FUSED.BLOCK_O
    return shape.dtype in HALVES and square and whole and fits


def keepable(shape: Shape) -> bool:
    """Whether the second factor's blocks can be resident, and aren't so small as to idle."""
    sizes = (shape.k, shape.p, shape.q, shape.l, shape.s, shape.r)
    return shape.dtype in HALVES and all(n % 16 == 0 for n in sizes) and 32 < shape.r <= 128


def resident_programs(units: int, tiles: int, multiprocessors: int) -> int:
    """Into how many programs, for each of `units` parts of the factors, tiles of rows are dealt."""
    return min(tiles, max(1, multiprocessors // units))


def _one(shape: Shape, tile: FusedTile, rates: Rates) -> Plan:
    x, _, y, w1, w2 = _sizes(shape)
    groups = -(-shape.l // tile.BLOCK_C)
    fetches = -(-shape.rows // tile.BLOCK_M)
    resident = tile == RESIDENT_FUSED
    if resident:
        fetches = resident_programs(groups, fetches, rates.multiprocessors)
    seconds = _pass(x, groups, w1 + w2, fetches, y, rates)
    return Plan("split" if groups > 1 else "fused", resident, seconds)


def _two(shape: Shape, resident: Tile | None, rates: Rates) -> float:
    x, z, y, w1, w2 = _sizes(shape)
    first = product_tile(shape.dtype, shape.q) if resident is None else panel_tile(shape.q)
    second = resident or product_tile(shape.dtype, shape.s, shape.l)
    fetches = -(-shape.rows // first.BLOCK_M)
    seconds = _pass(x, -(-shape.q // first.BLOCK_O), w1, fetches, z, rates)
    again = -(-shape.s // second.BLOCK_O)
    fetches = -(-shape.rows // second.BLOCK_M)
    if resident is not None:
        units = -(-shape.l // second.BLOCK_C) * again
        fetches = resident_programs(units, fetches, rates.multiprocessors)
    return seconds + _pass(z, again, w2, fetches, y, rates)


def _pass(
    source: int,
    again: int,
    weights: int,
    fetches: int,
    result: int,
    rates: Rates,
    sectors: int = 1,  # touched for each one's worth of the result
) -> float:
    """Of a kernel that reads its source `again` times, its weights `fetches` times."""
    memory = source + weights + result
    l2 = again * source + fetches * weights + sectors * result
    return max(memory / rates.memory, l2 / rates.l2) + rates.launch


def _sizes(shape: Shape) -> tuple[int, int, int, int, int]:
    """Bytes of x, z, y, w1 and w2."""
    rows, k, q, p, l, s, r, dtype = shape
    elements = rows * k * p, rows * k * q, rows * s * l, k * q * p, l * s * r
    x, z, y, w1, w2 = (n * dtype.itemsize for n in elements)
    return x, z, y, w1, w2


# As csrc/monarch/monarch_cluster.h has it.
CLUSTERS = (2, 4, 8, 16)  # thread blocks
CLUSTER_SHARED = 227 * 1024  # bytes of each
TOGETHER = 8  # adjacent blocks of a factor that a warp group multiplies: 16 bytes of z or y
FIRSTS_TOGETHER = 4  # the same of w1, where the factors are streamed
WARP_GROUPS = 2  # of a thread block
RESIDENT_ROWS, STREAMED_ROWS = 32, 40  # of a warp group's tile
RESIDENT_BUFFERS, STREAMED_BUFFERS = 2 * 4 * 4096 + 2048, 6 * 10240 + 2048  # what else has room


class Cluster(NamedTuple):
    size: int  # thread blocks
    resident: bool  # the factors, in their shared memory


def cluster(shape: Shape) -> Cluster | None:
    """The smallest that serves `shape`, streaming the factors where none can hold them."""
    if shape.dtype not in HALVES or shape.q % shape.l != 0:
        return None
    serving = [Cluster(size, True) for size in CLUSTERS if _holds(shape, size)]
    serving += [Cluster(size, False) for size in CLUSTERS if _streams(shape, size)]
    return serving[0] if serving else None


def _holds(shape: Shape, size: int) -> bool:
    _, k, q, p, l, s, r, _ = shape
    boxes = p == 32 or p % 64 == 0
    whole = all(n % (TOGETHER * size) == 0 for n in (k, l)) and s % TOGETHER == 0
    elements = k * q * p + l * s * r + WARP_GROUPS * RESIDENT_ROWS * l * r
    return boxes and whole and _room(shape, size, elements) >= RESIDENT_BUFFERS


def _streams(shape: Shape, size: int) -> bool:
    _, k, q, p, l, s, r, _ = shape
    tiles = q == l == 128 and all(n % 64 == 0 for n in (p, s, r))
    whole = k % (FIRSTS_TOGETHER * size) == 0 and l % (TOGETHER * size) == 0
    elements = WARP_GROUPS * STREAMED_ROWS * l * r
    return tiles and whole and _room(shape, size, elements) >= STREAMED_BUFFERS


def _room(shape: Shape, size: int, elements: int) -> int:
    """Bytes that are left beside a thread block's share of so many elements."""
    return CLUSTER_SHARED - elements // size * shape.dtype.itemsize


def cluster_cost(shape: Shape, rates: Rates = _H200) -> Plan | None:
    """What z costs on its way between multiprocessors is not counted.

    y is written 8 adjacent l at a time: half sectors.
    """
    if (found := cluster(shape)) is None:
        return None
    x, _, y, w1, w2 = _sizes(shape)
    fetches = -(-shape.rows // (WARP_GROUPS * STREAMED_ROWS))
    if found.resident:
        tiles = -(-shape.rows // (WARP_GROUPS * RESIDENT_ROWS))
        fetches = resident_programs(found.size, tiles, rates.multiprocessors)
    return Plan("cluster", found.resident, _pass(x, 1, w1 + w2, fetches, y, rates, sectors=2))


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


def panel_tile(O: int) -> Tile:
    """For halves, where the result goes to panels: a block's outputs at once, up to 128."""
    if O <= 64:
        return product_tile(torch.bfloat16, O)
    return Tile(256, 128, 64, 1, 16, 2)


def resident_tile(I: int) -> Tile:
    """For adjacent blocks with up to 128 inputs."""
    return Tile(16, 64, 64, 16, 16, 3) if I <= 64 else Tile(16, 32, 128, 16, 16, 2)


def weights_tile(dtype: torch.dtype, O: int, I: int, adjacent: int = 1, shared: int = 0) -> Tile:
    """For dw[c, o, i] = sum over m of g[m, c, o] conj(x[m, c, i]).

    As wide as registers hold its sums: what is wider reads g or x again for each tile. Those of
    many adjacent blocks pass through shared memory as they are stored.
    """
    if dtype in HALVES:
        if adjacent == 1:
            if min(O, I) > 64:
                return Tile(64, 128, 128, 1, 8, 2)
            wide = max(O, I) > 32
            return Tile(64, 64, 64, 1, 4, 2) if wide else Tile(64, 32, 32, 1, 4, 2)
        if adjacent <= 4:
            return Tile(32, 32, 32, 4, 4, 1)
        if O > 32 and shared >= WIDE_SHARED:
            return Tile(16, 64, 32, 16, 16, 2)
        return Tile(16, 32, 32, 16, 8, 2)
    if dtype.is_complex:
        return Tile(16, 16, 16, 1, 4, 1) if adjacent == 1 else Tile(16, 16, 16, 4, 4, 1)
    return Tile(16, 32, 32, 1, 4, 2) if adjacent == 1 else Tile(16, 16, 32, 8, 8, 1)


def gradients_tile(
    dtype: torch.dtype, O: int, I: int, shared: int = 0, whole: bool = True
) -> Tile | None:
    """For dx and dw of a block per program at once, where both have room. `whole`: as above."""
    widest = max(O, I)
    room = (128 if shared >= RESIDENT_SHARED else 64) if whole else 32
    if dtype not in HALVES or widest > room:
        return None
    if widest <= 32:
        return Tile(64, 32, 32, 1, 4, 2)
    return Tile(64, 64, 64, 1, 4, 3) if widest <= 64 else Tile(64, 128, 128, 1, 8, 2)


def interpreted_tile(adjacent: int = 1) -> Tile:
    """For Triton's interpreter, where a program takes as long whatever its tile's size."""
    return Tile(32, 16, 16, 4 if adjacent > 1 else 1, 1, 1)


def split_rows(rows: int, programs: int, multiprocessors: int) -> int:
    """How many rows one program of a weights' gradient adds up: a power of two.

    As many programs as keep a device busy, each with enough rows to be worth its partial sum.
    """
    splits = max(1, 8 * multiprocessors // programs)
    return max(256, 1 << (-(-rows // splits) - 1).bit_length())
