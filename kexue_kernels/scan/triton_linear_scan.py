"""linear_scan on GPUs with Triton: what is launched, and in what configuration."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kexue_kernels import dispatch
from kexue_kernels.checks import state_dtype
from kexue_kernels.scan.triton_chained_scan import new_chain
from kexue_kernels.scan.triton_linear_scan_kernel import linear_scan_kernel
from kexue_kernels.triton_common import launching_on, multiprocessors, words

HALVES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
NUM_STAGES = 1


class Problem(NamedTuple):
    """What a configuration depends on."""

    sequences: int
    L: int  # steps of each sequence; packed: of all
    D: int
    dtype: torch.dtype
    paired: bool = False  # halves are read as words of two channels
    invariant: bool = False  # `a` does not change over time
    backward: bool = False
    packed: bool = False


class Config(NamedTuple):
    """Tiles of RUNS runs of RUN steps by BLOCK_D channels; chained, a program has one tile."""

    RUN: int
    RUNS: int
    BLOCK_D: int
    num_warps: int
    chained: bool
    WINDOW: int = 8

    @property
    def BLOCK_L(self) -> int:
        return self.RUN * self.RUNS


def configure(problem: Problem, multiprocessors: int) -> Config:
    """The configuration of a launch.

    A tile's row is 64 bytes, what DRAM gives at once, and a thread's part of it 16; the runs
    are as long as lets 3 or 4 programs onto a multiprocessor by their registers. On an H200
    (4.3 TB/s, 132 of them) a program then has some 5 us from first to last access at full
    bandwidth, of which waiting for its chain takes about 1, two round trips to L2. A chain's
    own pace is one such wait for 64 chunks: 77 us for a million steps, 805 MB take 190.
    """
    p = problem
    size = p.dtype.itemsize
    BLOCK_D = min(64 // size, triton.next_power_of_2(p.D))
    RUNS = 128 // max(1, BLOCK_D * size // 16)
    longest = 16 if not p.backward and (p.invariant or size == 4) else 8
    if size == 2 and not p.paired:  # each half takes a register of its own
        longest //= 2
    if p.packed and p.backward:  # finding the sequence takes registers too
        longest //= 2
    typical = triton.cdiv(p.L, p.sequences) if p.packed else p.L
    RUN = min(longest, triton.next_power_of_2(triton.cdiv(typical, RUNS)))
    chunks = triton.cdiv(p.L, RUN * RUNS)
    programs = triton.cdiv(p.D, BLOCK_D) * (1 if p.packed else p.sequences)
    return Config(RUN, RUNS, BLOCK_D, 4, chunks > 4 and programs < 32 * multiprocessors)


def configure_interpreted(problem: Problem, multiprocessors: int) -> Config:
    """For Triton's interpreter, which scans element by element: few of them, in chains too."""
    del multiprocessors
    BLOCK_D = min(16, triton.next_power_of_2(max(problem.D, 2)))
    return Config(8, 2, BLOCK_D, 1, problem.L > 64, 2)


def forward(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    call = _Call(a, b, None, cu_seqlens, backward=False)
    h = torch.empty(b.shape, dtype=b.dtype, device=b.device)
    final_state = call.new_states() if return_final_state else None
    call.launch(h, initial_state, final_state, None, None, reverse)
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
    call = _Call(a, grad_h, h, cu_seqlens, backward=True)
    grad_b = torch.empty(grad_h.shape, dtype=grad_h.dtype, device=grad_h.device)
    grad_initial = None if initial_state is None else call.new_states()
    grad_a = None
    if h is not None:
        grad_a = call.new_sums() if call.invariant else torch.empty_like(grad_b)
    call.launch(grad_b, grad_final, grad_initial, initial_state, grad_a, not reverse)
    return grad_a, grad_b, grad_initial


@dataclass
class _Call:
    """x_s = c_s x_{s-1} + b_s with c from `a`, and for grad_a the states `h`."""

    a: Tensor
    b: Tensor
    h: Tensor | None
    cu_seqlens: Tensor | None
    backward: bool

    def __post_init__(self) -> None:
        B, L, D = self.b.shape
        packed = self.cu_seqlens is not None
        self.sequences = B if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1
        self.invariant = self.a.shape[1] == 1
        self.paired = self.b.dtype in HALVES and all(
            x is None or _pairs(x) for x in (self.b, self.h, None if self.invariant else self.a)
        )
        problem = Problem(
            self.sequences, L, D, self.b.dtype, self.paired, self.invariant, self.backward, packed
        )
        rule = configure_interpreted if dispatch.interpreting() else configure
        self.config = rule(problem, multiprocessors(self.b.device))
        chunks = triton.cdiv(L, self.config.BLOCK_L)
        self.rows = L // self.config.BLOCK_L + self.sequences if packed else B * chunks

    def new_states(self) -> Tensor:
        shape = self.sequences, self.b.shape[2]
        return torch.empty(shape, dtype=state_dtype(self.b.dtype), device=self.b.device)

    def new_sums(self) -> Tensor:
        """[B, any, D]; zeros, as packing may leave rows without a chunk."""
        B, _, D = self.b.shape
        rows = self.rows if self.config.chained else self.sequences
        dtype = state_dtype(self.b.dtype)
        return torch.zeros((B, rows // B, D), dtype=dtype, device=self.b.device)

    def launch(
        self,
        x: Tensor,
        first: Tensor | None,
        last: Tensor | None,
        initial: Tensor | None,
        grad_a: Tensor | None,
        reverse: bool,
    ) -> None:
        _, L, D = x.shape
        config = self.config
        chain = None
        if config.chained:
            width = D * (2 if x.is_complex() else 1)
            chain = new_chain(self.rows, width, config.WINDOW, x.device)
        programs = self.rows if config.chained else self.sequences
        view = _as_pairs if self.paired else words
        a = words(self.a) if self.invariant else view(self.a)
        b = view(self.b)
        h = None if self.h is None else view(self.h)
        with launching_on(x):
            linear_scan_kernel[(programs * triton.cdiv(D, config.BLOCK_D),)](
                a,
                b,
                words(x),
                None if first is None else words(first),
                None if last is None else words(last),
                h,
                None if initial is None or h is None else words(initial),
                None if grad_a is None else words(grad_a),
                self.cu_seqlens,
                chain,
                L,
                D,
                self.sequences,
                self.rows,
                *_strides(a),
                *_strides(b),
                *((0, 0, 0) if h is None else _strides(h)),
                BACKWARD=self.backward,
                INVARIANT=self.invariant,
                REVERSE=reverse,
                HALF=HALVES[x.dtype] if self.paired else None,
                ONE=one(x.dtype, self.paired),
                WINDOW=config.WINDOW,
                RUN=config.RUN,
                RUNS=config.RUNS,
                BLOCK_D=config.BLOCK_D,
                num_warps=config.num_warps,
                num_stages=NUM_STAGES,
            )


def one(dtype: torch.dtype, paired: bool) -> float | int:
    """1, as the kernel loads it: a number, a complex word, or a word of two halves."""
    if dtype.is_complex:
        return 0x3F800000
    if paired:
        return 0x3F803F80 if dtype == torch.bfloat16 else 0x3C003C00
    return 1.0


def _pairs(x: Tensor) -> bool:
    """Whether each two channels of a half-precision x are one aligned word of 32 bits."""
    even = (*x.stride()[:-1], x.shape[-1], x.storage_offset())
    return x.stride(-1) == 1 and not any(n % 2 for n in even) and x.data_ptr() % 4 == 0


def _as_pairs(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def _strides(x: Tensor) -> tuple[int, ...]:
    """In elements; 0 broadcasts."""
    return tuple(
        0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)
    )
