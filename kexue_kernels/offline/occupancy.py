"""How many blocks of a kernel one multiprocessor holds, and what keeps it from holding more."""

from dataclasses import dataclass

from kexue_kernels.offline.archs import Arch

PARTS = 4  # register files of a multiprocessor; a warp lives in one of them


@dataclass(frozen=True)
class Occupancy:
    blocks: int
    warps: int
    threads: int
    share: float  # of the warps that the multiprocessor can hold
    limited_by: tuple[str, ...]  # "registers", "shared memory", "warps", "blocks"


def occupancy(arch: Arch, threads: int, registers: int, shared: int) -> Occupancy:
    """For blocks of `threads`, with `registers` a thread and `shared` bytes a block.

    No block at all (blocks 0) where one needs more than there is.
    """
    warps = -(-threads // arch.warp_size)
    limits = {
        "registers": _warps_by_registers(arch, registers) // warps,
        "shared memory": _blocks_by_shared(arch, shared),
        "warps": arch.max_warps // warps,
        "blocks": arch.max_blocks,
    }
    blocks = min(limits.values())
    return Occupancy(
        blocks=blocks,
        warps=blocks * warps,
        threads=blocks * warps * arch.warp_size,
        share=blocks * warps / arch.max_warps,
        limited_by=tuple(name for name, limit in limits.items() if limit == blocks),
    )


def _warps_by_registers(arch: Arch, registers: int) -> int:
    if registers > arch.max_registers:
        return 0
    per_warp = _rounded(max(registers, 1) * arch.warp_size, arch.register_granule)
    return PARTS * (arch.registers // PARTS // per_warp)


def _blocks_by_shared(arch: Arch, shared: int) -> int:
    if shared > arch.shared_per_block:
        return 0
    per_block = _rounded(shared + arch.shared_reserved, arch.shared_granule)
    return arch.shared // per_block if per_block else arch.max_warps


def _rounded(value: int, granule: int) -> int:
    return -(-value // granule) * granule
