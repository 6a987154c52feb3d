"""What the machine can do at best: bytes copied and matrix products computed per second."""

import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kexue_kernels.benchmarks.clock import Clock

COPIES = 10
PRODUCTS = 5


@dataclass(frozen=True)
class Roof:
    copy_bytes_per_second: float  # of a large copy, bytes read plus bytes written
    copy_buffer_bytes: int
    flops_per_second: Mapping[str, float]  # by dtype, of a large matrix product

    def seconds(self, bytes: int, flops: int, dtype: torch.dtype) -> tuple[float, str]:
        """The shortest time that bytes and FLOPs allow, and which of the two sets it."""
        memory = bytes / self.copy_bytes_per_second
        arithmetic = flops / self.flops_per_second[short(dtype)]
        return (memory, "memory") if memory >= arithmetic else (arithmetic, "arithmetic")


def measure(device: torch.device, clock: Clock, quick: bool = False) -> Roof:
    """Medians of a few copies (of buffers well over the cache) and a few matrix products."""
    size = buffer_bytes(device)
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    order = 8192 if device.type == "cuda" else 1024 if quick else 2048
    flops = {short(dtype): _matrix_rate(device, clock, dtype, order) for dtype in dtypes}
    # CPUs have no faster path for halves that every PyTorch takes
    flops.setdefault(short(torch.bfloat16), flops[short(torch.float32)])
    return Roof(_copy_rate(device, clock, size), size, flops)


def buffer_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return min(2**30, free // 8)
    return min(2**30, max(2**28, 4 * _last_level_cache()))


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _last_level_cache() -> int:
    names = [name for name in os.sysconf_names if name.endswith("CACHE_SIZE")]
    return max((os.sysconf(name) for name in names), default=0)


def _copy_rate(device: torch.device, clock: Clock, size: int) -> float:
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)

    def copy() -> object:
        return target.copy_(source)

    copy()
    return 2 * source.nbytes / statistics.median(clock.sample(copy) for _ in range(COPIES))


def _matrix_rate(device: torch.device, clock: Clock, dtype: torch.dtype, order: int) -> float:
    x = torch.randn(order, order, device=device).to(dtype)

    def product() -> object:
        return x @ x

    product()
    return 2 * order**3 / statistics.median(clock.sample(product) for _ in range(PRODUCTS))
