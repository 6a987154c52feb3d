"""selective_scan on GPUs with Triton: what is launched, and in what configuration."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kexue_kernels import dispatch
from kexue_kernels.scan.chunks import SelectiveGradients, SelectiveInputs, chunk_length
from kexue_kernels.scan.triton_selective_scan_backward_kernel import (
    selective_scan_backward_kernel,
)
from kexue_kernels.scan.triton_selective_scan_kernel import selective_scan_kernel
from kexue_kernels.scan.triton_selective_splits_kernel import join_kernel, split_kernel
from kexue_kernels.triton_common import launching_on, multiprocessors

NUM_STAGES = 1
JOIN_WARPS, JOIN_RUN = 4, 8


class Config(NamedTuple):
    """Programs of BLOCK_D channels with N >= n states each, that read RUN steps at once."""

    N: int
    BLOCK_D: int
    RUN: int
    num_warps: int
    split_length: int  # whole chunks


def configure(rows: int, L: int, d: int, n: int, parts: int, groups: int, sms: int) -> Config:
    """The configuration of a launch over `rows` of a batch; `parts` is 2 where A is complex.

    A thread has 16 states, of one channel while n allows it; 4 complex ones, as their sines and
    cosines take registers. Time is split where that gives the device at least four times the
    programs: with splits, the exponentials are taken twice.
    """
    N = triton.next_power_of_2(n)
    BLOCK_D = max(8, min(32, 512 // (N * parts**2)))
    num_warps = max(1, N * BLOCK_D * parts**2 // 512)
    RUN = max(1, min(8, 128 // (N * parts)))
    warps = rows * groups * triton.cdiv(d // groups, BLOCK_D) * num_warps
    splits = triton.cdiv(8 * sms, warps) if warps < 2 * sms else 1
    chunk = chunk_length(n)
    chunks = max(triton.cdiv(triton.cdiv(L, splits), chunk), 4)
    return Config(N, BLOCK_D, RUN, num_warps, chunks * chunk)


def run_of(config: Config, keeps_states: bool) -> int:
    """Steps that the forward reads at once. Stores of kept states hold the loads of a run apart;
    without them a compiler moves all to the front, and registers last for half as many."""
    return config.RUN if keeps_states else max(1, config.RUN // 2)


class Tile(NamedTuple):
    """Of the backward: a chunk as RUNS runs of RUN steps, by BLOCK_D channels."""

    RUN: int
    RUNS: int
    BLOCK_D: int
    num_warps: int


def configure_tile(L: int, n: int, parts: int, packed: bool) -> Tile:
    """A thread has 8 real numbers of a tile, of which it keeps ten kinds at once; 4 where the
    borders of packed sequences take registers too."""
    steps = triton.next_power_of_2(min(L, chunk_length(n)))
    RUN = min(4, steps)
    RUNS = steps // RUN
    BLOCK_D = min(32, max(8, 128 // RUNS // parts))
    return Tile(RUN, RUNS, BLOCK_D, max(1, RUNS * BLOCK_D * parts // (32 if packed else 64)))


def configure_tile_interpreted(L: int, n: int, parts: int, packed: bool) -> Tile:
    """Few channels, as elements are scanned one by one."""
    steps = triton.next_power_of_2(min(L, chunk_length(n)))
    RUN = min(8, steps)
    return Tile(RUN, steps // RUN, 2, 1)


def configure_interpreted(
    rows: int, L: int, d: int, n: int, parts: int, groups: int, sms: int
) -> Config:
    """For Triton's interpreter: splits of a chunk, in few programs."""
    N = triton.next_power_of_2(n)
    return Config(N, triton.next_power_of_2(d // groups), 4, 1, chunk_length(n))


def forward(
    inputs: SelectiveInputs,
    out: Tensor,
    final_state: Tensor | None,
    checkpoints: Tensor | None,
) -> None:
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus = inputs
    call = Call(u, A, B, C, cu_seqlens)
    if cu_seqlens is not None and final_state is not None:
        _of_empty_sequences(final_state, initial_state)
    B_rows, C_rows = call.matrix(B), call.matrix(C)
    with launching_on(u):
        leaving = call.between_splits(
            u, delta, A, B_rows, None, delta_bias, initial_state, delta_softplus, reverse=False
        )
        selective_scan_kernel[(call.programs,)](
            u,
            delta,
            reals(A),
            B_rows,
            C_rows,
            D,
            z,
            delta_bias,
            reals(initial_state),
            reals(leaving),
            call.borders,
            out,
            reals(final_state),
            reals(checkpoints),
            *call.sizes,
            *strides(u),
            *strides(delta),
            *strides(z),
            SOFTPLUS=delta_softplus,
            **call.constants,
            CHUNK=chunk_length(call.n),
            RUN=run_of(call.config, checkpoints is not None),
            N=call.config.N,
            BLOCK_D=call.config.BLOCK_D,
            num_warps=call.config.num_warps,
            num_stages=NUM_STAGES,
        )


def backward(
    grad_out: Tensor,
    grad_final: Tensor | None,
    inputs: SelectiveInputs,
    checkpoints: Tensor,
) -> SelectiveGradients:
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus = inputs
    call = Call(u, A, B, C, cu_seqlens)
    batch, L, d = u.shape
    n, splits = call.n, call.splits
    tile = call.tile
    packed = cu_seqlens is not None
    per_split = batch, splits, n, d
    B_rows, C_rows = call.matrix(B), call.matrix(C)
    grad_u, grad_delta = (torch.empty(u.shape, dtype=u.dtype, device=u.device) for _ in range(2))
    grad_z = None if z is None else torch.empty_like(grad_u)
    grad_A = A.new_zeros(per_split)
    blocks = call.groups * triton.cdiv(d // call.groups, tile.BLOCK_D)
    per_block = batch, blocks, n, L
    grad_B, grad_C = (
        A.new_zeros(per_split) if m.ndim == 2 else A.new_empty(per_block) for m in (B, C)
    )
    grad_D = None if D is None else D.new_zeros((batch, splits, d))
    grad_bias = None if delta_bias is None else delta_bias.new_zeros((batch, splits, d))
    grad_initial = None
    if initial_state is not None and packed:
        grad_initial = torch.empty_like(initial_state)
        _of_empty_sequences(grad_initial, grad_final)
    K = A.new_zeros(per_split)
    if grad_final is not None and not packed:
        K[:, -1] = grad_final.mT
    with launching_on(u):
        arriving = call.between_splits(
            grad_out, delta, A, C_rows, z, delta_bias, grad_final, delta_softplus, reverse=True
        )
        if arriving is not None:
            K[:, :-1] = arriving[:, 1:]
        selective_scan_backward_kernel[(batch * splits * blocks,)](
            grad_out,
            u,
            delta,
            reals(A.mT.contiguous()),
            reals(B.mT.contiguous()) if B.ndim == 2 else B_rows,
            reals(C.mT.contiguous()) if C.ndim == 2 else C_rows,
            D,
            z,
            delta_bias,
            reals(initial_state) if packed else None,
            reals(grad_final) if packed else None,
            call.borders,
            reals(checkpoints),
            reals(K),
            grad_u,
            grad_delta,
            reals(grad_A),
            reals(grad_B),
            reals(grad_C),
            grad_D,
            grad_z,
            grad_bias,
            reals(grad_initial),
            *call.sizes[:-1],
            *strides(grad_out),
            *strides(u),
            *strides(delta),
            *strides(z),
            SOFTPLUS=delta_softplus,
            **call.constants,
            CHUNK=chunk_length(n),
            RUN=tile.RUN,
            RUNS=tile.RUNS,
            N=call.config.N,
            BLOCK_D=tile.BLOCK_D,
            VECTOR=4 if d // call.groups % 4 == 0 else 1,
            num_warps=tile.num_warps,
            num_stages=NUM_STAGES,
        )
    if initial_state is not None and not packed:
        grad_initial = K[:, 0].mT
    return SelectiveGradients(
        grad_u,
        grad_delta,
        grad_A.sum((0, 1)).mT,
        call.matrix_gradient(grad_B, B),
        call.matrix_gradient(grad_C, C),
        None if grad_D is None else grad_D.sum((0, 1)),
        grad_z,
        None if grad_bias is None else grad_bias.sum((0, 1)),
        grad_initial,
    )


@dataclass
class Call:
    """What the kernels of one call have in common."""

    u: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    cu_seqlens: Tensor | None

    def __post_init__(self) -> None:
        batch, L, d = self.u.shape
        self.n = self.A.shape[1]
        self.groups = math.lcm(*(m.shape[2] for m in (self.B, self.C) if m.ndim == 4))
        parts = 2 if self.A.is_complex() else 1
        rule = configure_interpreted if dispatch.interpreting() else configure
        tile_rule = configure_tile_interpreted if dispatch.interpreting() else configure_tile
        sms = multiprocessors(self.u.device)
        self.config = rule(batch, L, d, self.n, parts, self.groups, sms)
        self.tile = tile_rule(L, self.n, parts, self.cu_seqlens is not None)
        self.splits = triton.cdiv(L, self.config.split_length)
        blocks = self.groups * triton.cdiv(d // self.groups, self.config.BLOCK_D)
        self.programs = batch * self.splits * blocks
        self.sizes = L, d, self.n, self.groups, self.splits, self.config.split_length, 1
        self.constants = {
            "COMPLEX": self.A.is_complex(),
            "B_INVARIANT": self.B.ndim == 2,
            "C_INVARIANT": self.C.ndim == 2,
        }
        self.borders = None if self.cu_seqlens is None else borders(self.cu_seqlens, L)

    def between_splits(
        self,
        value: Tensor,
        delta: Tensor,
        A: Tensor,
        M: Tensor,
        z: Tensor | None,
        delta_bias: Tensor | None,
        first: Tensor | None,
        softplus: bool,
        reverse: bool,
    ) -> Tensor | None:
        """[batch, splits, n, d]: the state after each split, or its gradient before each."""
        if self.splits == 1:
            return None
        batch, _, d = self.u.shape
        states = A.new_empty((batch, self.splits, self.n, d))
        totals = delta.new_empty((batch, self.splits, d), dtype=torch.float32)
        split_kernel[(self.programs,)](
            value,
            delta,
            reals(A),
            M,
            z,
            delta_bias,
            reals(first),
            self.borders,
            self.cu_seqlens,
            reals(states),
            totals,
            *self.sizes,
            *strides(value),
            *strides(delta),
            *strides(z),
            SOFTPLUS=softplus,
            COMPLEX=A.is_complex(),
            INVARIANT=self.constants["C_INVARIANT" if reverse else "B_INVARIANT"],
            REVERSE=reverse,
            RUN=self.config.RUN,
            N=self.config.N,
            BLOCK_D=self.config.BLOCK_D,
            num_warps=self.config.num_warps,
            num_stages=NUM_STAGES,
        )
        BLOCK = JOIN_WARPS * 32
        join_kernel[(batch * triton.cdiv(self.n * d, BLOCK),)](
            reals(A),
            reals(states),
            totals,
            d,
            self.n,
            self.splits,
            COMPLEX=A.is_complex(),
            REVERSE=reverse,
            RUN=JOIN_RUN,
            BLOCK=BLOCK,
            num_warps=JOIN_WARPS,
            num_stages=NUM_STAGES,
        )
        return states

    def matrix(self, x: Tensor) -> Any:
        """B or C as the kernels read it."""
        if x.ndim == 2:
            return reals(x)
        if x.shape[2] != self.groups:
            x = x.repeat_interleave(self.groups // x.shape[2], dim=2)
        x = torch.nn.functional.pad(x.to(self.A.dtype), (0, self.config.N - self.n))
        return reals(x.contiguous())

    def matrix_gradient(self, sums: Tensor, of: Tensor) -> Tensor:
        """The gradient of B or C from partial sums."""
        if of.ndim == 2:
            return sums.sum((0, 1)).mT
        batch, L, groups, n = of.shape
        summed = sums.view(batch, groups, -1, n, L).sum(2)
        return summed.permute(0, 3, 1, 2).to(of.dtype)


def borders(cu_seqlens: Tensor, L: int) -> Tensor:
    """int32 [L]: for each step 4 times its packed sequence, plus 2 where that begins, plus 1 where
    it ends."""
    steps = torch.arange(L, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, steps, right=True) - 1
    begins, ends = cu_seqlens[sequence] == steps, cu_seqlens[sequence + 1] == steps + 1
    return (4 * sequence + 2 * begins + ends).int()


def reals(x: Tensor | None) -> Any:
    """complex64 as pairs of float32."""
    return torch.view_as_real(x) if x is not None and x.is_complex() else x


def strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()


def _of_empty_sequences(last: Tensor, first: Tensor | None) -> None:
    """What passes an empty sequence unchanged; the kernel overwrites the others."""
    if first is None:
        last.zero_()
    else:
        last.copy_(first)
