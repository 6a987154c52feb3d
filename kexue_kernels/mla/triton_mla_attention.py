"""mla_attention on GPUs with Triton: heads in groups, their keys and values by matrix products."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor

from kexue_kernels import dispatch
from kexue_kernels.autocast import without_autocast
from kexue_kernels.mla.groups import heads_per_group
from kexue_kernels.mla.triton_mla_attention_backward_kernel import (
    delta_kernel,
    keys_kernel,
    queries_kernel,
)
from kexue_kernels.mla.triton_mla_attention_kernel import forward_kernel
from kexue_kernels.triton_common import launching_on, precision

LOG2E = 1.4426950408889634
DELTA_ROWS, DELTA_WARPS = 16, 4
_TOKENS = 128  # of a tile, at most
_TINY = 1e-37  # a scale of 0 would turn a hidden score, minus infinity, to NaN

Kernel = Literal["forward", "keys", "queries"]
Target = Literal["sm_80", "sm_90", "sm_100", "amd"]  # "sm_80" stands for all others


class Config(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


class Widths(NamedTuple):
    """Columns of a tile: powers of two, 16 or more; none where there are no positions."""

    BLOCK_D: int
    BLOCK_R: int
    BLOCK_V: int


def widths(dk: int, dr: int, dv: int) -> Widths:
    def padded(size: int) -> int:
        return max(16, triton.next_power_of_2(size))

    return Widths(padded(dk), padded(dr) if dr else 0, padded(dv))


def configure(kernel: Kernel, width: Widths, dtype: torch.dtype, target: Target) -> Config:
    """Tiles that fit at 128 + 64 columns and values of 128, for any narrower heads.

    sm_90 multiplies by warp groups, M tiles (for the keys' kernel, N tiles) of 128 among two.
    """
    if dtype != torch.float32 and sum(width) <= 320 and max(width) <= 128:
        return _HALVES[target][kernel]
    BLOCK_M, BLOCK_N = _SMALL[kernel]
    return Config(BLOCK_M, BLOCK_N, 4 if target == "amd" else 8, 1)


_HALVES: dict[Target, dict[Kernel, Config]] = {
    "sm_80": {  # within the 99 KiB of its smaller kin
        "forward": Config(128, 32, 8, 2),
        "keys": Config(32, 32, 4, 2),
        "queries": Config(64, 16, 4, 2),
    },
    "sm_90": {
        "forward": Config(128, 64, 8, 3),
        "keys": Config(32, 128, 8, 2),
        "queries": Config(128, 64, 8, 3),
    },
    "sm_100": {
        "forward": Config(128, 64, 8, 3),
        "keys": Config(32, 128, 8, 2),
        "queries": Config(128, 64, 8, 2),
    },
    "amd": {  # whose waves are of 64
        "forward": Config(128, 32, 4, 1),
        "keys": Config(16, 64, 4, 1),
        "queries": Config(64, 32, 4, 1),
    },
}
# float32, which has no tensor cores, and wider heads
_SMALL: dict[Kernel, tuple[int, int]] = {"forward": (32, 16), "keys": (16, 32), "queries": (16, 16)}


def configure_interpreted(
    kernel: Kernel, width: Widths, dtype: torch.dtype, target: Target
) -> Config:
    """For Triton's interpreter: few programs."""
    del kernel, width, dtype, target
    return Config(32, 16, 1, 1)


def target_of(device: torch.device) -> Target:
    if torch.version.hip:
        return "amd"
    if device.type == "cpu":  # interpreting
        return "sm_80"
    major, _ = torch.cuda.get_device_capability(device)
    found: dict[int, Target] = {9: "sm_90", 10: "sm_100"}
    return found.get(major, "sm_80")


@without_autocast
def forward(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    softmax_scale: float,
    causal: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if softmax_scale < 0:  # the kernel takes a row's largest product for its largest score
        rest = kv_latent, k_rope, w_uk, w_uv
        return forward(-q_nope, -q_rope, *rest, -softmax_scale, causal, cu_seqlens)
    B, T, H, _ = q_nope.shape
    calls = _Calls(q_nope, q_rope, k_rope, w_uv.shape[1], causal, cu_seqlens)
    out = calls.new(B, T, H, w_uv.shape[1])
    lse = calls.new(B, H, T, dtype=torch.float32)
    latent = kv_latent.reshape(B * T, -1)
    scale = max(softmax_scale * LOG2E, _TINY)
    with launching_on(q_nope):
        for heads in calls.groups():
            k, v = expanded(latent, w_uk[heads]), expanded(latent, w_uv[heads])
            tensors = k, calls.k_rope, v, out[:, :, heads], lse[:, heads]
            calls.launch("forward", forward_kernel, heads, tensors, scale)
    return out, lse


@without_autocast
def backward(
    grad: Tensor,
    q_nope: Tensor,
    q_rope: Tensor,
    kv_latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    causal: bool,
    cu_seqlens: Tensor | None,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    calls = _Calls(q_nope, q_rope, k_rope, w_uv.shape[1], causal, cu_seqlens)
    grad = near(grad)
    latent = kv_latent.reshape(-1, kv_latent.shape[2])
    d_q = (calls.new(*q_nope.shape), calls.new(*q_rope.shape)) if any(wanted[:2]) else None
    sums = _Sums(latent, calls.k_rope, w_uk, w_uv, wanted)
    with launching_on(q_nope):
        delta = _delta(grad, out, lse)
        for heads in calls.groups():
            k, v = expanded(latent, w_uk[heads]), expanded(latent, w_uv[heads])
            read = k, calls.k_rope, v, grad[:, :, heads], lse[:, heads], delta[:, heads]
            strides = grad.stride()
            if d_q is not None:
                to = [x[:, :, heads] for x in d_q]
                calls.launch("queries", queries_kernel, heads, (*read, *to), softmax_scale, strides)
            if any(wanted[2:]):
                d_k, d_v = calls.new(*k.shape), calls.new(*v.shape)
                d_rope = calls.new(*q_rope[:, :, heads].shape, dtype=torch.float32)
                to = [d_k, d_rope, d_v]
                calls.launch("keys", keys_kernel, heads, (*read, *to), softmax_scale, strides)
                sums.add(heads, d_k, d_rope, d_v)
    first = (None, None) if d_q is None else d_q
    found = (*first, *sums.gradients(kv_latent))
    return tuple(x if want else None for x, want in zip(found, wanted, strict=True))


class _Calls:
    """Launches of kernels for groups of heads of the same queries."""

    def __init__(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        k_rope: Tensor,
        dv: int,
        causal: bool,
        cu_seqlens: Tensor | None,
    ) -> None:
        self.q_nope, self.q_rope, self.k_rope = near(q_nope), near(q_rope), k_rope.contiguous()
        self.cu_seqlens = cu_seqlens
        self.sizes = q_nope.shape[3], q_rope.shape[3], dv
        self.widths = widths(*self.sizes)
        even = (size == width for size, width in zip(self.sizes, self.widths, strict=True))
        self.constants: dict[str, Any] = {
            "CAUSAL": causal,
            "VARLEN": cu_seqlens is not None,
            "PRECISION": precision(q_nope.dtype),
            **self.widths._asdict(),
            **dict(zip(("EVEN_D", "EVEN_R", "EVEN_V"), even, strict=True)),
        }

    def groups(self) -> Iterator[slice]:
        B, T, H, dk = self.q_nope.shape
        size = heads_per_group(B * T, H, dk, self.sizes[2], self.q_nope.itemsize)
        return (slice(first, min(first + size, H)) for first in range(0, H, size))

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """For a result. With cu_seqlens, what belongs to no sequence stays 0."""
        make = torch.empty if self.cu_seqlens is None else torch.zeros
        return make(shape, dtype=dtype or self.q_nope.dtype, device=self.q_nope.device)

    def launch(
        self,
        name: Kernel,
        kernel: Any,
        heads: slice,
        tensors: Sequence[Tensor],
        scale: float,
        strides: Sequence[int] = (),
    ) -> None:
        q_nope, q_rope = self.q_nope[:, :, heads], self.q_rope[:, :, heads]
        B, T, count, _ = q_nope.shape
        rule = configure_interpreted if dispatch.interpreting() else configure
        config = rule(name, self.widths, q_nope.dtype, target_of(q_nope.device))
        block = config.BLOCK_N if name == "keys" else config.BLOCK_M
        sequences, bounds = q_nope, q_nope  # not read
        programs = B * triton.cdiv(T, block)
        if self.cu_seqlens is not None:
            bounds, sequences = self.cu_seqlens, sequence_of_programs(self.cu_seqlens, T, block)
            programs = sequences.numel()
        if programs:
            kernel[(programs, count)](
                q_nope, q_rope, *tensors, sequences, bounds,
                T, self.q_nope.shape[2], *self.sizes, scale,
                *q_nope.stride(), *q_rope.stride(), *strides, **self.constants, **config._asdict(),
            )  # fmt: skip


class _Sums:
    """The gradients of what all heads share, summed in the groups' order, and of the weights."""

    def __init__(
        self, latent: Tensor, k_rope: Tensor, w_uk: Tensor, w_uv: Tensor, wanted: tuple[bool, ...]
    ) -> None:
        self.latent, self.w_uk, self.w_uv = latent, w_uk, w_uv
        zeros = functools.partial(torch.zeros, dtype=torch.float32, device=latent.device)
        self.d_latent = zeros(latent.shape) if wanted[2] else None
        self.d_k_rope = zeros(k_rope.shape) if wanted[3] else None
        self.d_uk = latent.new_empty(w_uk.shape) if wanted[4] else None
        self.d_uv = latent.new_empty(w_uv.shape) if wanted[5] else None

    def add(self, heads: slice, d_k: Tensor, d_rope: Tensor, d_v: Tensor) -> None:
        """A group's: d_k [B T, heads dk], d_rope [B, T, heads, dr], d_v [B T, heads dv]."""
        if self.d_latent is not None:
            self.d_latent += d_k @ self.w_uk[heads].flatten(0, 1)
            self.d_latent += d_v @ self.w_uv[heads].flatten(0, 1)
        if self.d_k_rope is not None:
            self.d_k_rope += d_rope.sum(2)
        for d_w, d_x in ((self.d_uk, d_k), (self.d_uv, d_v)):
            if d_w is not None:
                torch.mm(d_x.T, self.latent, out=d_w[heads].flatten(0, 1))

    def gradients(self, kv_latent: Tensor) -> tuple[Tensor | None, ...]:
        dtype = kv_latent.dtype
        d_latent = None if self.d_latent is None else self.d_latent.to(dtype)
        d_k_rope = None if self.d_k_rope is None else self.d_k_rope.to(dtype)
        if d_latent is not None:
            d_latent = d_latent.view(kv_latent.shape)
        return d_latent, d_k_rope, self.d_uk, self.d_uv


def expanded(latent: Tensor, w: Tensor) -> Tensor:
    """[B T, heads d], of latent [B T, dc] and some heads' w [heads, d, dc]."""
    return latent @ w.flatten(0, 1).T


def sequence_of_programs(cu_seqlens: Tensor, T: int, block: int) -> Tensor:
    """Each program's sequence: s has those from cu_seqlens[s] // block + s on."""
    N = cu_seqlens.numel() - 1
    if N == 0:
        return cu_seqlens[:0]
    device = cu_seqlens.device
    starts = cu_seqlens[:-1] // block + torch.arange(N, dtype=torch.int32, device=device)
    programs = torch.arange(T // block + N, dtype=torch.int32, device=device)
    found = torch.searchsorted(starts, programs, right=True, out_int32=True)
    return found.sub_(1).clamp_(min=0)


def near(x: Tensor) -> Tensor:
    """x [B, T, H, D], contiguous if a tile reaches too far in it for offsets of 32 bits."""
    reach = _TOKENS * x.stride(1) + x.shape[3] * x.stride(3)
    return x if reach < 2**31 else x.contiguous()


def _delta(grad: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """rowsum(grad out) [B, H, T]"""
    B, T, H, dv = out.shape
    delta = torch.empty_like(lse)
    delta_kernel[(triton.cdiv(B * T * H, DELTA_ROWS),)](
        grad, out.contiguous(), delta, B, T, H, dv, *grad.stride(),
        BLOCK_M=DELTA_ROWS, BLOCK_V=max(16, triton.next_power_of_2(dv)), num_warps=DELTA_WARPS,
    )  # fmt: skip
    return delta
