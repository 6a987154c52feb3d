"""The GPUs that kernels are compiled for: limits, issue rates and datasheet rates.

Limits: "Compute Capabilities" in the CUDA programming guide; for gfx942 "Pipeline descriptions"
in the ROCm Compute Profiler's documentation and LLVM's AMDGPU usage page.
Results per cycle per SM (FP32, integer, special function, shuffle): "Throughput of Native
Arithmetic Instructions" in the CUDA C++ Best Practices Guide 13; the L1 and shared memory path
moves 128 bytes a cycle. Tensor cores: dense half-precision FMAs from the architecture
whitepapers. Bandwidth, FLOP/s, SMs and boost clock: the datasheet of the device named.
"""

from collections.abc import Mapping
from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Datasheet:
    device: str
    bandwidth: float  # bytes/s
    fp32: float  # FLOP/s, no tensor cores
    matrix: float  # FLOP/s, dense bf16
    multiprocessors: int
    clock: float  # Hz

    @property
    def bytes_per_cycle(self) -> float:
        """A multiprocessor's share of the memory bandwidth."""
        return self.bandwidth / (self.multiprocessors * self.clock)


@dataclass(frozen=True)
class Pipe:
    """What executes one kind of instruction, and the lanes (or bytes) it takes in a cycle."""

    name: str
    per_cycle: float


@dataclass(frozen=True)
class Arch:
    """Per multiprocessor: an NVIDIA SM, an AMD compute unit."""

    name: str
    datasheet: Datasheet
    max_warps: int
    max_blocks: int
    shared: int  # bytes
    shared_per_block: int  # bytes, what one block may have
    lanes: Mapping[str, Pipe]  # by instruction kind: lanes per cycle
    data: Mapping[str, Pipe]  # by instruction kind: bytes per cycle
    tensor: float  # FMAs per cycle
    issue: float | None = 4  # instructions per cycle; None: no such limit of its own
    warp_size: int = 32
    registers: int = 64 * KIB  # of 32 bits, in four parts
    register_granule: int = 256  # per warp
    max_registers: int = 255  # per thread
    shared_granule: int = 128
    shared_reserved: int = KIB  # per block, for the system


def _nvidia_lanes(fp32: int, integer: int = 64, fp64: int = 2) -> dict[str, Pipe]:
    return {
        "fp32": Pipe("FP32", fp32),
        "fp64": Pipe("FP64", fp64),
        "integer": Pipe("integer", integer),
        "special": Pipe("special function", 16),
        "shuffle": Pipe("L1 and shared memory", 32),
    }


_NVIDIA_DATA = dict.fromkeys(("global", "shared", "local"), Pipe("L1 and shared memory", 128))
_VECTOR = "vector ALU"  # a wave of 64 takes a SIMD four cycles, transcendentals four times that

_ALL = (
    Arch(
        "sm_80",
        Datasheet("A100 SXM 80 GB", 2.039e12, 19.5e12, 312e12, 108, 1.41e9),
        *(64, 32, 164 * KIB, 163 * KIB),
        *(_nvidia_lanes(64, fp64=32), _NVIDIA_DATA, 1024),
    ),
    Arch(
        "sm_86",
        Datasheet("A10", 0.6e12, 31.2e12, 125e12, 72, 1.695e9),
        *(48, 16, 100 * KIB, 99 * KIB),
        *(_nvidia_lanes(128), _NVIDIA_DATA, 512),
    ),
    Arch(
        "sm_89",
        Datasheet("L40S", 0.864e12, 91.6e12, 362e12, 142, 2.52e9),
        *(48, 24, 100 * KIB, 99 * KIB),
        *(_nvidia_lanes(128), _NVIDIA_DATA, 512),
    ),
    Arch(
        "sm_90",
        Datasheet("H100 SXM", 3.35e12, 66.9e12, 989e12, 132, 1.98e9),
        *(64, 32, 228 * KIB, 227 * KIB),
        *(_nvidia_lanes(128, fp64=64), _NVIDIA_DATA, 2048),
    ),
    Arch(
        "sm_100",
        Datasheet("B200", 8e12, 75e12, 2250e12, 148, 1.965e9),
        *(64, 32, 228 * KIB, 227 * KIB),
        *(_nvidia_lanes(128, fp64=64), _NVIDIA_DATA, 4096),
    ),
    Arch(
        "sm_120",
        Datasheet("RTX 5090", 1.792e12, 104.8e12, 210e12, 170, 2.407e9),
        *(48, 24, 100 * KIB, 99 * KIB),
        *(_nvidia_lanes(128, integer=128), _NVIDIA_DATA, 256),
    ),
    Arch(
        "gfx942",
        Datasheet("MI300X", 5.3e12, 163.4e12, 1307e12, 304, 2.1e9),
        max_warps=32,
        max_blocks=32,
        shared=64 * KIB,
        shared_per_block=64 * KIB,
        lanes={
            "fp32": Pipe(_VECTOR, 64),
            "fp64": Pipe(_VECTOR, 64),
            "integer": Pipe(_VECTOR, 64),
            "special": Pipe(_VECTOR, 16),
            "control": Pipe("scalar ALU", 64),
        },
        data={
            "global": Pipe("L1", 64),
            "local": Pipe("L1", 64),
            "shared": Pipe("LDS", 128),
            "shuffle": Pipe("LDS", 128),
        },
        tensor=1024,
        issue=None,
        warp_size=64,
        registers=128 * KIB,
        register_granule=8 * 64,
        max_registers=512,
        shared_granule=512,
        shared_reserved=0,
    ),
)

ARCHS: Mapping[str, Arch] = {arch.name: arch for arch in _ALL}
DEFAULT_ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
