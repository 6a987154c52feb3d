"""Numbers in Triton kernels, real and complex alike, and what launchers ask of a device.

A number is a tuple of float32 tensors: (x,) or (re, im). A complex64 tensor in memory is a
tensor of int64 words (`words` views it so): the real part in the low half, as loads of whole
complex numbers stay as wide as those of real ones.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kexue_kernels import dispatch


def inline(function: Callable[..., Any]) -> Any:
    """triton.jit for what kernels call. Under Triton's interpreter it stays a Python function:
    there every call of a jitted one patches Triton's language anew, a millisecond."""
    return function if dispatch.interpreting() else triton.jit(function)


@inline
def from_bits(low):
    """float32 from the low half of int64."""
    return low.to(tl.int32).to(tl.float32, bitcast=True)


@inline
def to_bits(x):
    """int64, zero above float32's bits."""
    return x.to(tl.uint32, bitcast=True).to(tl.int64)


@inline
def pair(low, high):
    """Two float32 in an int64 word."""
    return to_bits(low) | (to_bits(high) << 32)


@inline
def unpack(x, HALF: tl.constexpr):
    """A number [R, D] from what a load gave: [R, D], or [R, D / 2] words of two HALFs."""
    if HALF is not None:
        if tl.bfloat16 == HALF:
            low = (x << 16).to(tl.float32, bitcast=True)
            high = (x & -65536).to(tl.float32, bitcast=True)
        else:
            low = x.to(tl.int16).to(HALF, bitcast=True).to(tl.float32)
            high = (x >> 16).to(tl.int16).to(HALF, bitcast=True).to(tl.float32)
        return (tl.reshape(tl.join(low, high), (x.shape[0], 2 * x.shape[1])),)
    elif x.dtype == tl.int64:
        return (from_bits(x), from_bits(x >> 32))
    else:
        return (x.to(tl.float32),)


@inline
def pack(x, dtype: tl.constexpr):
    """What a store of `dtype` takes from a number."""
    if len(x) == 2:
        return pair(x[0], x[1])
    else:
        return x[0].to(dtype)


@inline
def constant(value: tl.constexpr, shape: tl.constexpr, COMPLEX: tl.constexpr):
    """A real constant as a number."""
    if COMPLEX:
        return (tl.full(shape, value, tl.float32), tl.full(shape, 0.0, tl.float32))
    else:
        return (tl.full(shape, value, tl.float32),)


@inline
def select(condition, x, y):
    if len(x) == 2:
        return (tl.where(condition, x[0], y[0]), tl.where(condition, x[1], y[1]))
    else:
        return (tl.where(condition, x[0], y[0]),)


@inline
def is_zero(x):
    if len(x) == 2:
        return (x[0] == 0) & (x[1] == 0)
    else:
        return x[0] == 0


@inline
def conjugate(x):
    if len(x) == 2:
        return (x[0], -x[1])
    else:
        return x


@inline
def add(x, y):
    if len(x) == 2:
        return (x[0] + y[0], x[1] + y[1])
    else:
        return (x[0] + y[0],)


@inline
def multiply(x, y):
    if len(x) == 2:
        return (x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0])
    else:
        return (x[0] * y[0],)


@inline
def multiply_add(x, y, z):
    """x y + z"""
    if len(x) == 2:
        re = x[0] * y[0] + z[0]
        im = x[0] * y[1] + z[1]
        return (re - x[1] * y[1], im + x[1] * y[0])
    else:
        return (x[0] * y[0] + z[0],)


def words(x: Tensor) -> Tensor:
    """`x`, complex64 viewed as int64."""
    return x.view(torch.int64) if x.is_complex() else x


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """A GPU's; 4 for the CPU that stands in for one under Triton's interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def launching_on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make `x`'s current where it is not."""
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def _as_int(x):
    return x if isinstance(x, int) else int(x.handle.data.item())


def _as_it_is(x):
    return x


# A loop's bound: the interpreter of Triton 3.6 takes no scalar tensor for one.
bound = _as_int if dispatch.interpreting() else inline(_as_it_is)


def _dot_widened(x, y, sums):
    return tl.dot(x.to(tl.float32), y.to(tl.float32), sums, input_precision="ieee")


def _dot(x, y, sums):
    return tl.dot(x, y, sums, input_precision="ieee")


# x y + sums [M, N] in float32. Triton's interpreter computes products of bfloat16 wrongly.
dot = _dot_widened if dispatch.interpreting() else inline(_dot)


def _narrow_by_bits(x, dtype):
    if dtype != tl.bfloat16 or x.dtype != tl.float32:
        return x.to(dtype)
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x).to(dtype)


def _narrow(x, dtype):
    return x.to(dtype)


# x in a narrower dtype, ties to even. Triton's interpreter would cut bits off for bfloat16.
narrow = _narrow_by_bits if dispatch.interpreting() else inline(_narrow)


def precision(dtype: torch.dtype) -> str:
    """`tl.dot`'s for float32: exact, unless PyTorch's matrix products may be TF32."""
    if dtype in (torch.bfloat16, torch.float16) or torch.version.hip is not None:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    allowed = getattr(matmul, "fp32_precision", None)
    if allowed is None:  # before PyTorch 2.9
        return "tf32" if matmul.allow_tf32 else "ieee"
    return "tf32" if allowed == "tf32" else "ieee"
