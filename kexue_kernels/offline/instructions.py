"""Instructions of a compiled kernel, its hottest loop, and what that loop asks of each pipe."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kexue_kernels.offline.archs import Arch

KINDS = (
    "tensor",
    "global",
    "shared",
    "local",
    "shuffle",
    "special",
    "fp32",
    "fp64",
    "integer",
    "control",
    "other",
)


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    kind: str  # one of KINDS
    bytes: int = 0  # a lane moves, where it moves data
    fmas: int = 0  # a warp's share of a tensor-core instruction, in half-precision; 0: unknown
    target: int | None = None  # where a branch goes


@dataclass(frozen=True)
class Loop:
    """The innermost loop with most instructions; the whole kernel where no loop is hot.

    Hot is a loop with a quarter of the kernel's instructions or of its global memory traffic:
    one that merely waits for another block is not.
    """

    is_loop: bool
    instructions: int
    mix: Mapping[str, int]  # by kind, in KINDS' order, zeros left out
    cycles: Mapping[str, float]  # a multiprocessor's, for one pass of one warp; most first

    @property
    def busiest(self) -> str:
        return next(iter(self.cycles), "")


def hottest_loop(code: Sequence[Instruction], arch: Arch) -> Loop:
    body = _hottest_body(code)
    counts = Counter(instruction.kind for instruction in body or code)
    return Loop(
        is_loop=bool(body),
        instructions=len(body or code),
        mix={kind: counts[kind] for kind in KINDS if counts[kind]},
        cycles=_cycles(body or code, arch),
    )


def _hottest_body(code: Sequence[Instruction]) -> Sequence[Instruction]:
    """Straight from a backward branch's target to the branch (the last one to that target)."""
    ends: dict[int, int] = {}
    for instruction in code:
        if instruction.target is not None and instruction.target < instruction.address:
            ends[instruction.target] = instruction.address
    innermost = [
        (start, end)
        for start, end in ends.items()
        if not any(
            start <= other and stop <= end and (other, stop) != (start, end)
            for other, stop in ends.items()
        )
    ]
    bodies = [[i for i in code if start <= i.address <= end] for start, end in innermost]
    return max((body for body in bodies if _is_hot(body, code)), key=len, default=[])


def _is_hot(body: Sequence[Instruction], code: Sequence[Instruction]) -> bool:
    traffic = 4 * _global_bytes(body) >= _global_bytes(code) > 0
    return traffic or 4 * len(body) >= len(code)


def _global_bytes(code: Sequence[Instruction]) -> int:
    return sum(instruction.bytes for instruction in code if instruction.kind == "global")


def _cycles(code: Sequence[Instruction], arch: Arch) -> dict[str, float]:
    """Each pipe's cycles for one warp, as if nothing ever waited and no cache ever hit in L2."""
    cycles: defaultdict[str, float] = defaultdict(float)
    for instruction in code:
        kind = instruction.kind
        if kind in arch.lanes:
            pipe = arch.lanes[kind]
            cycles[pipe.name] += arch.warp_size / pipe.per_cycle
        if kind in arch.data:
            pipe = arch.data[kind]
            cycles[pipe.name] += arch.warp_size * instruction.bytes / pipe.per_cycle
        if kind == "global":
            traffic = arch.warp_size * instruction.bytes
            cycles["DRAM"] += traffic / arch.datasheet.bytes_per_cycle
        if kind == "tensor" and instruction.fmas:
            cycles["tensor core"] += instruction.fmas / arch.tensor
    if arch.issue:
        cycles["issue"] = len(code) / arch.issue
    return dict(sorted(cycles.items(), key=lambda item: -item[1]))
