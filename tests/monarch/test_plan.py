"""The cost model of monarch_matmul on a GPU, without a GPU."""

import pytest
import torch

from kexue_kernels.monarch.plan import (
    Rates,
    Shape,
    costs,
    fusable,
    interpreted_tile,
    plan,
    product_tile,
    split_rows,
    weights_tile,
)

BF16, FP16, F32, C64 = torch.bfloat16, torch.float16, torch.float32, torch.complex64
ROWS = 65536


def square(n: int, blocks: int, dtype: torch.dtype = BF16, rows: int = ROWS) -> Shape:
    """n x n, of `blocks` square blocks in either factor."""
    each = n // blocks
    return Shape(rows, blocks, each, each, blocks, each, each, dtype)


def test_each_way_where_it_is_the_cheapest() -> None:
    assert plan(square(256, 16)).path == "fused"
    assert plan(square(1024, 32)).path == "split"
    assert plan(square(4096, 64)).path == "two"
    assert plan(square(16384, 128)).path == "two"
    assert plan(square(1024, 4)).path == "two"


def test_what_bounds_each_way() -> None:
    """By hand, n = 1024 with 32 blocks of 32 x 32 in bfloat16: 2 KiB a row, 64 KiB a factor."""
    slow_memory, slow_l2 = Rates(1e9, 1e18, 0), Rates(1e18, 1e9, 0)
    row, factor = 2048, 65536
    x = ROWS * row

    def seconds(rates: Rates) -> dict[str, float]:
        return {each.path: each.seconds for each in costs(square(1024, 32), rates)}

    assert seconds(slow_memory) == pytest.approx(
        {"split": (2 * x + 2 * factor) / 1e9, "two": (4 * x + 2 * factor) / 1e9}
    )
    first = 2 * x + ROWS / 128 * factor
    second = 2 * x + ROWS / 64 * factor
    split = 3 * x + ROWS / 64 * 2 * factor  # x once for each half of the l-blocks
    assert seconds(slow_l2) == pytest.approx({"split": split / 1e9, "two": (first + second) / 1e9})
    launches = seconds(Rates(1e18, 1e18, 1.0))
    assert launches == pytest.approx({"split": 1.0, "two": 2.0})


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


@pytest.mark.parametrize("dtype", [BF16, FP16, F32, C64])
def test_adjacent_blocks_make_whole_sectors(dtype: torch.dtype) -> None:
    for tile in (product_tile(dtype, 64, 64), weights_tile(dtype, 64, 64, 64)):
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
