"""Seconds and bytes of one call, on CPU and GPU."""

import ctypes
import gc
import math
import pathlib
import time
from collections.abc import Callable

import torch

Call = Callable[[], object]

SHORTEST_SAMPLE = 2e-3  # seconds: CPU calls are repeated until a sample is this long
FLUSH_BYTES = 512 * 2**20  # over any L2, and long enough to hide a launch's cost on the host

CPU_METHOD = {
    "time": "perf_counter around calls repeated to 2 ms or more; caches as the last call left them",
    "memory": "growth of the process's resident high-water mark during one call, after freed heap "
    "pages went back to the system: outputs, gradients and scratch; inputs left out",
}
GPU_METHOD = {
    "time": "CUDA events around one call, after a buffer larger than the L2 cache was overwritten",
    "memory": "torch.cuda.max_memory_allocated during one call less what was allocated before: "
    "outputs, gradients and scratch; inputs left out",
}


class Clock:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.method = GPU_METHOD if self.on_gpu else CPU_METHOD
        self._flush: torch.Tensor | None = None
        if self.on_gpu:
            cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
            size = max(FLUSH_BYTES, 4 * cache)
            self._flush = torch.empty(size, dtype=torch.uint8, device=device)

    def once(self, call: Call) -> float:
        """Wall-clock seconds of one call from start to finished."""
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def repeats(self, seconds: float) -> int:
        """Calls in a sample, for a call that takes `seconds`."""
        if self.on_gpu:
            return 1
        return max(1, math.ceil(SHORTEST_SAMPLE / max(seconds, 1e-7)))

    def sample(self, call: Call, repeats: int = 1) -> float:
        """Seconds a call: one sample."""
        return self._events(call) if self.on_gpu else self._counter(call, repeats)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def peak_bytes(self, call: Call) -> int | None:
        """Memory that one call takes at its height; None where the system does not say."""
        return self._gpu_peak(call) if self.on_gpu else _resident_peak(call)

    def _counter(self, call: Call, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            kept = call()
        seconds = (time.perf_counter() - start) / repeats
        del kept  # freed outside the clock, as a GPU frees it
        return seconds

    def _events(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        assert self._flush is not None
        self._flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def _gpu_peak(self, call: Call) -> int:
        self.wait()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.wait()
        return torch.cuda.max_memory_allocated() - before


def _resident_peak(call: Call) -> int | None:
    gc.collect()
    if not _reset_high_water():
        return None
    before = _high_water()
    call()
    after = _high_water()
    return None if before is None or after is None else max(0, after - before)


def _reset_high_water() -> bool:
    """Give freed heap pages back, then set VmHWM to what is resident now (Linux, see proc(5))."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _high_water() -> int | None:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
