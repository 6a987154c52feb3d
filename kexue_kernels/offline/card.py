"""All that is known of one compiled kernel without running it."""

from dataclasses import dataclass, field

from kexue_kernels.offline.archs import Arch
from kexue_kernels.offline.instructions import Loop
from kexue_kernels.offline.occupancy import Occupancy


@dataclass(frozen=True)
class Roofline:
    """Where the op itself stands, at the datasheet rates of the GPU named."""

    device: str
    bytes_per_element: float
    flops_per_element: float
    intensity: float  # FLOP/byte
    ridge: float  # FLOP/byte from which arithmetic is the bound
    bound: str  # "memory" or "compute"
    elements_per_second: float


@dataclass(frozen=True)
class Card:
    family: str
    op: str
    backend: str  # "triton" or "cuda"
    name: str  # the configuration
    kernel: str
    arch: str
    error: str = ""  # why it does not compile; the rest is then unknown
    threads: int | None = None  # per block
    num_warps: int | None = None
    num_stages: int | None = None
    registers: int | None = None
    spills: int | None = None  # instructions that spill or reload; AMD: vector registers spilled
    scalar_spills: int = 0  # AMD: scalar registers kept in lanes of vector ones, not in memory
    stack: int | None = None  # bytes per thread
    shared: int | None = None  # bytes per block, what a launch adds left out
    shared_limit: int | None = None
    occupancy: Occupancy | None = None
    loop: Loop | None = None
    roofline: Roofline | None = None
    problems: list[str] = field(default_factory=list)


def problems(spills: int, stack: int, shared: int, limit: int, held: Occupancy | None) -> list[str]:
    """What a kernel should not be shipped with."""
    found = []
    if spills:
        found.append(f"{spills} spill instructions")
    if stack:
        found.append(f"a stack of {stack} bytes")
    if shared > limit:
        found.append(f"{shared} bytes of shared memory, above the limit of {limit}")
    if held is not None and held.blocks == 0:
        found.append("not one block fits on a multiprocessor")
    return found


def roofline(
    arch: Arch, bytes_per_element: float, flops_per_element: float, loop: Loop
) -> Roofline:
    sheet = arch.datasheet
    rate = sheet.matrix if loop.mix.get("tensor") else sheet.fp32
    in_memory = bytes_per_element / sheet.bandwidth
    in_arithmetic = flops_per_element / rate
    return Roofline(
        device=sheet.device,
        bytes_per_element=bytes_per_element,
        flops_per_element=flops_per_element,
        intensity=flops_per_element / bytes_per_element,
        ridge=rate / sheet.bandwidth,
        bound="memory" if in_memory >= in_arithmetic else "compute",
        elements_per_second=1 / max(in_memory, in_arithmetic),
    )
