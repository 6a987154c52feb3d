"""What the launchers of CUDA C++ kernels for Hopper GPUs have in common."""

import contextlib
import functools
from collections.abc import Iterable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from kexue_kernels import _extension

ALIGNMENT = 16  # bytes, of every row: what one load moves


def refused_by_device(device: torch.device) -> list[str]:
    """Why kernels for Hopper can't run there."""
    found = []
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        found.append(f"the Hopper path needs compute capability (9, 0), this GPU has {capability}")
    if "sm_90a" not in module().build_info["archs"].split():
        found.append("the C++ extension was built without sm_90a (see KEXUE_CUDA_ARCHS)")
    return found


def rows_aligned(x: Tensor, strides: Iterable[int]) -> bool:
    """Whether rows, the last axis of x, are contiguous and start at multiples of 16 bytes."""
    bytes_apart = [stride * x.element_size() for stride in strides]
    return x.stride(-1) == 1 and all(n % ALIGNMENT == 0 for n in (x.data_ptr(), *bytes_apart))


@contextlib.contextmanager
def current_stream(device: torch.device) -> Iterator[int]:
    """Make `device` the current one; its current stream."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def module() -> ModuleType:
    module = _extension.load().module
    assert module is not None, "dispatch let a call through without the extension"
    return module
