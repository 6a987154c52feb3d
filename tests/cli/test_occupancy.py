"""Blocks per multiprocessor. The NVIDIA rows are what cuda_occupancy.h of CUDA 13.0 answers."""

import pytest

from kexue_kernels.offline.archs import ARCHS, KIB
from kexue_kernels.offline.occupancy import occupancy


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks", "limited_by"),
    [
        ("sm_80", 256, 32, 0, 8, ("registers", "warps")),
        ("sm_80", 256, 33, 0, 6, ("registers",)),  # 40 a thread, by granules of 256 a warp
        ("sm_80", 32, 16, 0, 32, ("blocks",)),
        ("sm_80", 128, 168, 0, 3, ("registers",)),
        ("sm_80", 64, 24, 33000, 4, ("shared memory",)),
        ("sm_80", 64, 24, 160 * KIB, 1, ("shared memory",)),
        ("sm_86", 128, 32, 0, 12, ("warps",)),
        ("sm_86", 32, 32, 0, 16, ("blocks",)),
        ("sm_89", 32, 32, 0, 24, ("blocks",)),
        ("sm_90", 256, 65, 0, 3, ("registers",)),
        ("sm_90", 128, 64, 48 * KIB, 4, ("shared memory",)),
        ("sm_100", 1024, 64, 0, 1, ("registers",)),
        ("sm_120", 512, 40, 0, 3, ("registers", "warps")),
        ("gfx942", 256, 128, 0, 4, ("registers",)),
        ("gfx942", 256, 129, 0, 3, ("registers",)),
        ("gfx942", 512, 64, 20 * KIB, 3, ("shared memory",)),
        ("gfx942", 64, 32, 64, 32, ("warps", "blocks")),
    ],
)
def test_blocks_and_what_limits_them(
    arch: str, threads: int, registers: int, shared: int, blocks: int, limited_by: tuple[str, ...]
) -> None:
    held = occupancy(ARCHS[arch], threads, registers, shared)
    assert (held.blocks, held.limited_by) == (blocks, limited_by)
    warps = threads // ARCHS[arch].warp_size
    assert (held.warps, held.threads) == (blocks * warps, blocks * threads)
    assert held.share == blocks * warps / ARCHS[arch].max_warps


@pytest.mark.parametrize(("arch", "limit"), [("sm_80", 163), ("sm_86", 99), ("sm_90", 227)])
def test_more_shared_memory_than_a_block_may_have(arch: str, limit: int) -> None:
    assert occupancy(ARCHS[arch], 128, 32, limit * KIB).blocks == 1
    assert occupancy(ARCHS[arch], 128, 32, limit * KIB + 1).blocks == 0


def test_the_datasheet_s_rate_is_the_pipe_s() -> None:
    """FP32 lanes, multiprocessors and clock give the FLOP/s; the tables agree with each other."""
    for arch in ARCHS.values():
        sheet = arch.datasheet
        lanes = arch.lanes["fp32"].per_cycle * (2 if arch.name.startswith("gfx") else 1)  # packed
        flops = 2 * lanes * sheet.multiprocessors * sheet.clock
        assert flops == pytest.approx(sheet.fp32, rel=0.01)
        matrix = 2 * arch.tensor * sheet.multiprocessors * sheet.clock
        assert matrix == pytest.approx(sheet.matrix, rel=0.1)
