"""linear_scan in CUDA C++: what is allocated and how a call is cut into tiles.

The kernels, their algorithm and their access pattern: csrc/scan/linear_scan_chain.cuh and
linear_scan_kernel.cuh. Nothing here waits for the device, so calls can be captured in a graph.
"""

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from kexue_kernels import _extension
from kexue_kernels.checks import state_dtype

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.complex64: 3}
MAX_WARPS = 8  # of a tile
MANY_CHAINS = 128  # enough to fill a device without many tiles of each under way


def forward(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    call = _prepare(b, cu_seqlens, backward=False)
    h = b.new_empty(b.shape)
    final_state = _states(b, call.sequences) if return_final_state else None
    with _stream(b.device) as stream:
        _module().linear_scan_cuda_forward(
            sizes=(*b.shape, call.sequences),
            cu_seqlens=_address(call.cu_seqlens),
            reverse=reverse,
            dtype=DTYPES[b.dtype],
            a=_array(a),
            b=_array(b),
            h=h.data_ptr(),
            initial=_address(initial_state),
            final=_address(final_state),
            warps=call.warps,
            workspace=_address(call.workspace),
            stream=stream,
        )
    return h, final_state


def backward(
    a: Tensor,
    h: Tensor | None,
    initial_state: Tensor | None,
    grad_h: Tensor,
    grad_final: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    call = _prepare(grad_h, cu_seqlens, backward=True)
    B, _, D = grad_h.shape
    grad_b = grad_h.new_empty(grad_h.shape)
    grad_initial = None if initial_state is None else _states(grad_h, call.sequences)
    time_invariant = a.shape[1] == 1
    grad_a = None
    if h is not None and time_invariant:  # a row of sums from each tile
        grad_a = grad_h.new_empty((B, call.chunks, D), dtype=state_dtype(a.dtype))
    elif h is not None:
        grad_a = grad_h.new_empty(grad_h.shape)
    with _stream(grad_h.device) as stream:
        _module().linear_scan_cuda_backward(
            sizes=(*grad_h.shape, call.sequences),
            cu_seqlens=_address(call.cu_seqlens),
            reverse=reverse,
            dtype=DTYPES[grad_h.dtype],
            a=_array(a),
            h=(0, 0, 0, 0) if h is None else _array(h),
            grad_h=_array(grad_h),
            initial=_address(initial_state),
            grad_final=_address(grad_final),
            grad_b=grad_b.data_ptr(),
            grad_a=_address(grad_a),
            partial=time_invariant,
            grad_initial=_address(grad_initial),
            warps=call.warps,
            workspace=_address(call.workspace),
            stream=stream,
        )
    return grad_a, grad_b, grad_initial


class _Call(NamedTuple):
    sequences: int
    cu_seqlens: Tensor | None
    warps: int
    chunks: int  # rows of partial sums of grad_a
    workspace: Tensor | None


def _prepare(b: Tensor, cu_seqlens: Tensor | None, backward: bool) -> _Call:
    B, L, D = b.shape
    sequences, length = B, L
    if cu_seqlens is not None:
        # Values on a device are not checked: wrong ones must still neither hang a kernel nor
        # lead it outside the data.
        cu_seqlens = cu_seqlens.clamp(0, L).cummax(0).values
        sequences = cu_seqlens.shape[0] - 1
        length = -(-L // sequences)
    chains = B * -(-D * b.element_size() // 128)
    warps = choose_warps(length, chains, _module().linear_scan_cuda_steps_per_warp(backward))
    sizes = (B, L, D, sequences)
    chunks, needed = _module().linear_scan_cuda_cut(
        sizes, _address(cu_seqlens), DTYPES[b.dtype], backward, warps
    )
    workspace = b.new_empty(needed, dtype=torch.uint8) if needed else None
    return _Call(sequences, cu_seqlens, warps, chunks, workspace)


def choose_warps(length: int, chains: int, steps_per_warp: int) -> int:
    """Warps of a tile: one tile if a sequence fits into one, else about equally full ones.

    Where there are many chains of tiles (one for every 128 bytes of a row), smaller tiles let
    an SM overlap more of them; where there are few, larger ones make the chains shorter.
    """
    needed = -(-length // steps_per_warp)
    if needed <= MAX_WARPS:
        return needed
    limit = MAX_WARPS if chains < MANY_CHAINS else MAX_WARPS // 2
    return -(-needed // -(-needed // limit))


def _states(b: Tensor, rows: int) -> Tensor:
    return b.new_empty((rows, b.shape[2]), dtype=state_dtype(b.dtype))


def _array(x: Tensor) -> tuple[int, int, int, int]:
    """Address, and strides in elements: 0 where x [1 or B, 1 or L, 1 or D] broadcasts."""
    batch, step, channel = (
        0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)
    )
    return x.data_ptr(), batch, step, channel


def _address(x: Tensor | None) -> int:
    """0, no array, for an empty one too."""
    return 0 if x is None or x.numel() == 0 else x.data_ptr()


@contextlib.contextmanager
def _stream(device: torch.device) -> Iterator[int]:
    """Make `device` the current one; its current stream."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def _module() -> ModuleType:
    module = _extension.load().module
    assert module is not None, "dispatch let a call through without the extension"
    return module
