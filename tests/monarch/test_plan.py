"""The cost model of monarch_matmul on a GPU, without a GPU."""

import pytest
import torch

from kexue_kernels.monarch.plan import (
    CLUSTERS,
    PANEL,
    RESIDENT_SHARED,
    WIDE_SHARED,
    Rates,
    Shape,
    cluster,
    cluster_cost,
    costs,
    fusable,
    gradients_tile,
    interpreted_tile,
    keepable,
    panel_tile,
    plan,
    product_tile,
    resident_programs,
    resident_tile,
    split_rows,
    weights_tile,
)

BF16, FP16, F32, C64 = torch.bfloat16, torch.float16, torch.float32, torch.complex64
ROWS = 65536


def square(n: int, blocks: int, dtype: torch.dtype = BF16, rows: int = ROWS) -> Shape:
    """n x n, of `blocks` square blocks in either factor."""
    each = n // blocks
    return Shape(rows, blocks, each, each, blocks, each, each, dtype)


def way(shape: Shape, shared: int = 0) -> tuple[str, bool]:
    return plan(shape, shared)[:2]


def test_each_way_where_it_is_the_cheapest() -> None:
    assert way(square(256, 16)) == ("fused", False)
    assert way(square(1024, 32)) == ("split", False)
    assert way(square(1024, 4)) == ("two", False)
    assert way(square(4096, 64)) == ("two", False)
    assert way(square(16384, 128)) == ("two", False)


def test_each_way_where_shared_memory_holds_the_factors() -> None:
    assert way(square(256, 16), RESIDENT_SHARED) == ("fused", False)
    assert way(square(1024, 32), RESIDENT_SHARED) == ("fused", True)
    assert way(square(1024, 32), RESIDENT_SHARED - 1) == ("split", False)
    assert way(square(1024, 4), RESIDENT_SHARED) == ("two", False)
    assert way(Shape(ROWS, 32, 64, 32, 64, 32, 32, BF16), RESIDENT_SHARED) == ("split", True)
    for n, blocks in ((2048, 32), (4096, 64), (16384, 128)):
        assert way(square(n, blocks), RESIDENT_SHARED) == ("two", True)


@pytest.mark.parametrize(
    ("n", "blocks", "fetching", "resident"),
    [
        (1024, 32, 1.54, 1.00),
        (2048, 32, 4.98, 3.90),
        (4096, 64, 9.86, 7.72),
        (16384, 128, 59.7, 45.2),
    ],
)
def test_what_an_h200_is_predicted_to_need(
    n: int, blocks: int, fetching: float, resident: float
) -> None:
    """In ns a row, as the family's page has it."""
    for shared, expected in ((0, fetching), (RESIDENT_SHARED, resident)):
        found = plan(square(n, blocks), shared).seconds / ROWS
        assert found * 1e9 == pytest.approx(expected, rel=5e-3)


def test_what_bounds_each_way() -> None:
    """By hand, n = 1024 with 32 blocks of 32 x 32 in bfloat16: 2 KiB a row, 64 KiB a factor."""
    slow_memory, slow_l2 = Rates(1e9, 1e18, 0), Rates(1e18, 1e9, 0)
    row, factor = 2048, 65536
    x = ROWS * row

    def seconds(rates: Rates) -> dict[tuple[str, bool], float]:
        found = costs(square(1024, 32), RESIDENT_SHARED, rates)
        return {each[:2]: each.seconds for each in found}

    ways = ("fused", True), ("split", False), ("two", False)
    whole, each = 2 * x + 2 * factor, 4 * x + 2 * factor
    expected = dict(zip(ways, (whole / 1e9, whole / 1e9, each / 1e9), strict=True))
    assert seconds(slow_memory) == pytest.approx(expected)
    kept = 2 * x + 132 * 2 * factor  # once for each multiprocessor
    split = 3 * x + ROWS / 64 * 2 * factor  # x once for each half of the l-blocks
    first = 2 * x + ROWS / 128 * factor
    second = 2 * x + ROWS / 64 * factor
    expected = dict(zip(ways, (kept / 1e9, split / 1e9, (first + second) / 1e9), strict=True))
    assert seconds(slow_l2) == pytest.approx(expected)
    expected = dict(zip(ways, (1.0, 1.0, 2.0), strict=True))
    assert seconds(Rates(1e18, 1e18, 1.0)) == pytest.approx(expected)


def test_what_bounds_two_kernels_of_which_the_second_is_resident() -> None:
    """By hand, n = 16384 with 128 blocks in bfloat16: 32 KiB a row, 4 MiB a factor."""
    row, factor = 2**15, 2**22
    x = ROWS * row
    found = costs(square(16384, 128), RESIDENT_SHARED, Rates(1e18, 1e9, 0))
    assert [each[:2] for each in found] == [("two", False), ("two", True)]
    first = 2 * x + ROWS / 256 * factor
    second = 5 * x + 4 * factor  # z for each quarter of the outputs; 32 parts in 4 programs each
    assert found[1].seconds == pytest.approx((first + second) / 1e9)


def test_rows_that_are_not_whole_vectors_are_not_fused() -> None:
    assert plan(square(1024, 32), vectors=False).path == "two"
    assert plan(square(1024, 32), RESIDENT_SHARED, vectors=False)[:2] == ("two", False)
    assert plan(square(4096, 64), RESIDENT_SHARED, vectors=False)[:2] == ("two", True)


def test_what_can_be_kept() -> None:
    shape = square(4096, 64)
    assert keepable(shape)
    assert keepable(shape._replace(dtype=FP16))
    assert not keepable(shape._replace(dtype=F32))
    assert not keepable(shape._replace(p=40))
    assert not keepable(square(1024, 32))  # too small
    assert not keepable(square(2**16, 256))  # too large


@pytest.mark.parametrize("I", [33, 64, 65, 128])
def test_what_is_kept_leaves_room_for_the_rows(I: int) -> None:
    tile = resident_tile(I)
    factor = 2 * tile.BLOCK_C * tile.BLOCK_O * tile.BLOCK_I
    rows = 2 * tile.BLOCK_C * tile.BLOCK_M * tile.BLOCK_I * (tile.num_stages - 1)
    assert tile.BLOCK_I >= I
    assert factor + rows <= RESIDENT_SHARED
    assert 2 * tile.BLOCK_C >= 32  # whole sectors


def test_panels_hold_whole_tiles() -> None:
    for O in (16, 32, 64, 128, 1000):
        assert PANEL % panel_tile(O).BLOCK_M == 0
    for I in (64, 128):
        assert PANEL % resident_tile(I).BLOCK_M == 0
        assert panel_tile(I).BLOCK_M % resident_tile(I).BLOCK_M == 0  # what is read was written


def test_tiles_of_rows_are_dealt_to_all_multiprocessors() -> None:
    assert resident_programs(4, 4096, 132) == 33
    assert resident_programs(32, 4096, 132) == 4
    assert resident_programs(1000, 4096, 132) == 1
    assert resident_programs(4, 7, 132) == 7


@pytest.mark.parametrize("dtype", [F32, C64])
def test_half_precision_alone_is_fused(dtype: torch.dtype) -> None:
    assert fusable(square(1024, 32))
    assert fusable(square(1024, 32, FP16))
    assert not fusable(square(1024, 32, dtype))
    assert [each.path for each in costs(square(1024, 32, dtype))] == ["two"]


@pytest.mark.parametrize(
    "change",
    [
        {"q": 16, "r": 16},  # l does not divide q
        {"q": 64, "r": 64},  # q is more than l
        {"p": 48},
        {"s": 64},
        {"p": 24},  # no whole vectors
        {"k": 24, "r": 24},
    ],
    ids=str,
)
def test_what_is_not_fused(change: dict[str, int]) -> None:
    shape = Shape(**(square(1024, 32)._asdict() | change))
    assert shape.k * shape.q == shape.l * shape.r
    assert not fusable(shape)
    assert plan(shape).path == "two"


def test_factors_that_are_not_square_are_fused_too() -> None:
    assert fusable(Shape(ROWS, 48, 32, 16, 32, 32, 48, BF16))


def test_tiles_of_a_block_per_program() -> None:
    """Tensor cores of Hopper take 64 rows and 4 warps at a time."""
    for O in (1, 32, 33, 64, 65, 4096):
        tile = product_tile(BF16, O)
        assert tile.BLOCK_C == 1
        assert tile.BLOCK_M % 64 == 0
        assert tile.num_warps % 4 == 0
        at_once = tile.BLOCK_O
        assert at_once >= min(O, 128)
    assert weights_tile(BF16, 64, 64).BLOCK_O == 64
    assert weights_tile(BF16, 16, 128).BLOCK_O == 64
    assert weights_tile(BF16, 128, 128)[1:3] == (128, 128)


def test_both_gradients_at_once_where_there_is_room() -> None:
    for widest, block in ((1, 32), (32, 32), (33, 64), (64, 64)):
        tile = gradients_tile(BF16, 1, widest)
        assert tile is not None
        assert tile[:4] == (64, block, block, 1)
    assert gradients_tile(BF16, 65, 1) is None
    assert gradients_tile(BF16, 33, 1, whole=False) is None
    assert gradients_tile(BF16, 31, 1, whole=False) == gradients_tile(BF16, 32, 32)
    assert gradients_tile(FP16, 65, 128, RESIDENT_SHARED) is not None
    assert gradients_tile(FP16, 129, 128, RESIDENT_SHARED) is None
    assert gradients_tile(F32, 16, 16, RESIDENT_SHARED) is None


@pytest.mark.parametrize("dtype", [BF16, FP16, F32, C64])
def test_adjacent_blocks_make_whole_sectors(dtype: torch.dtype) -> None:
    wide = weights_tile(dtype, 64, 64, 64, WIDE_SHARED)
    for tile in (product_tile(dtype, 64, 64), weights_tile(dtype, 64, 64, 64), wide):
        sector = dtype.itemsize * tile.BLOCK_C
        assert sector == 32
        assert tile.BLOCK_C % tile.num_warps == 0  # a warp of tensor cores has whole blocks
    assert product_tile(dtype, 64, 4).BLOCK_C <= 8


def test_ragged_sizes_take_smaller_tiles() -> None:
    whole, ragged = product_tile(BF16, 63, 64), product_tile(BF16, 63, 64, whole=False)
    assert ragged.BLOCK_M < whole.BLOCK_M
    assert ragged[3] == whole[3]


def test_the_interpreter_takes_the_same_kernels() -> None:
    for beside in (1, 2, 64):
        assert (interpreted_tile(beside).BLOCK_C == 1) == (
            product_tile(F32, 8, beside).BLOCK_C == 1
        )


def test_rows_of_a_partial_sum() -> None:
    """Powers of two, so that lengths leave the compile key; enough programs for the device."""
    assert split_rows(65536, 32, 132) == 2048
    assert split_rows(65536, 10_000, 132) == 65536
    assert split_rows(10, 1, 132) == 256
    seen = {split_rows(rows, 64, 132) for rows in range(1, 300_000, 997)}
    assert seen == {2**n for n in range(8, 16)}


# ---- clusters


def test_the_smallest_cluster_that_serves() -> None:
    assert cluster(square(1024, 32)) == (2, True)
    assert cluster(square(2048, 32)) == (4, True)
    assert cluster(square(4096, 64, FP16)) == (8, True)
    assert cluster(square(16384, 128)) == (16, False)
    assert cluster(Shape(1, 32, 64, 32, 64, 16, 32, BF16)) == (4, True)  # z has no room in 2
    assert cluster(Shape(1, 64, 128, 512, 128, 1024, 64, BF16)) == (8, False)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": F32},
        {"dtype": C64},
        {"q": 16, "r": 16},  # l does not divide q
        {"p": 48},  # rows that are no whole boxes
        {"s": 36},
        {"k": 40, "r": 40},  # no whole groups of blocks
        {"q": 64, "l": 8, "r": 256},
        {"p": 4096},  # too large to be kept, and not 128 hidden units a block
    ],
    ids=str,
)
def test_what_no_cluster_serves(change: dict[str, int]) -> None:
    shape = Shape(**(square(1024, 32)._asdict() | change))
    assert shape.k * shape.q == shape.l * shape.r
    assert cluster(shape) is None
    assert cluster_cost(shape) is None


@pytest.mark.parametrize(("n", "blocks"), [(1024, 32), (2048, 32), (4096, 64), (16384, 128)])
def test_a_cluster_has_room(n: int, blocks: int) -> None:
    """By hand, as csrc/monarch/monarch_cluster.h has it: factors, z and x of two warp groups."""
    found = cluster(square(n, blocks))
    assert found is not None
    assert found.size in CLUSTERS
    each, share = n // blocks, blocks // found.size
    factors, rows = 2 * share * each * each * 2, 2 * (32 if found.resident else 40)
    z = share * each * rows * 2
    buffers = 8 * 4096 if found.resident else 6 * 80 * 128
    assert factors * found.resident + z + buffers < 227 * 1024


@pytest.mark.parametrize(
    ("n", "blocks", "expected"),
    [(1024, 32, 1.19), (2048, 32, 2.33), (4096, 64, 4.56), (16384, 128, 37.0)],
)
def test_what_clusters_are_predicted_to_need(n: int, blocks: int, expected: float) -> None:
    """In ns a row on an H200, as the family's page has it: ahead but for the smallest."""
    found = cluster_cost(square(n, blocks))
    assert found is not None
    assert found.seconds / ROWS * 1e9 == pytest.approx(expected, rel=5e-3)
    others = plan(square(n, blocks), RESIDENT_SHARED).seconds
    assert (found.seconds < others) == (n > 1024)


def test_what_bounds_a_cluster() -> None:
    """By hand, n = 4096 with 64 blocks (512 KiB a factor) and n = 16384 (4 MiB)."""
    slow_memory, slow_l2 = Rates(1e9, 1e18, 0), Rates(1e18, 1e9, 0)
    for n, blocks, factor, fetches in ((4096, 64, 2**19, 132 // 8), (16384, 128, 2**22, 820)):
        x = ROWS * 2 * n
        memory, l2 = (cluster_cost(square(n, blocks), rates) for rates in (slow_memory, slow_l2))
        assert memory is not None
        assert l2 is not None
        assert memory.seconds == pytest.approx((2 * x + 2 * factor) / 1e9)
        assert l2.seconds == pytest.approx((3 * x + fetches * 2 * factor) / 1e9)  # y: half sectors


def test_the_chosen_way_is_never_a_cluster() -> None:
    """It is the CUDA backend's, which a call has to ask for."""
    for n, blocks in ((1024, 32), (2048, 32), (4096, 64), (16384, 128)):
        found = costs(square(n, blocks), RESIDENT_SHARED)
        assert "cluster" not in {each.path for each in found}
