"""nearest_codebook on GPUs with Triton: what is launched, in what configuration and bounds.

First come facts about the codes, the pass over all scores on the matrix unit, and certification;
then, in "exact", rows left over are compared in float64 by a fixed number of programs, which read
on the device how many rows there are. Nothing is copied to the host, and beside a few words for
each row and code nothing is kept.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kexue_kernels import dispatch
from kexue_kernels.triton_common import launching_on, multiprocessors
from kexue_kernels.vq.triton_nearest_codebook_codes_kernel import codes_kernel, mean_kernel
from kexue_kernels.vq.triton_nearest_codebook_kernel import certify_kernel, search_kernel
from kexue_kernels.vq.triton_nearest_codebook_recheck_kernel import recheck_kernel, settle_kernel
from kexue_kernels.vq.triton_nearest_codebook_scores import NONE

SAMPLES = 256  # codes whose mean is taken for that of all
RATIO = {True: 1.0, False: 16.0}  # of squares: centred halves are mostly exact only far away
ROWS = 128  # of certify_kernel
RECHECK_STAGES = 1
HEADS = 65535  # of one launch
WIDEST = 1 << 16  # with more channels no rounding is bounded


class Problem(NamedTuple):
    """What a configuration depends on."""

    heads: int
    N: int
    K: int
    d: int
    dtype: torch.dtype
    vectors: bool = True  # channels lie side by side and can be read 16 bytes at once


class Config(NamedTuple):
    """Tiles of BLOCK_N rows by BLOCK_K codes; CHUNKS of BLOCK_D channels, in one of which rows stay
    in shared memory; SPLITS of the codes. A recheck has blocks of BLOCK_R rows."""

    BLOCK_N: int
    BLOCK_K: int
    BLOCK_D: int
    CHUNKS: int
    num_warps: int
    num_stages: int
    SPLITS: int
    BLOCK_R: int = 64
    BLOCK_E: int = 16  # channels that a comparison in float64 reads at once
    programs: int = 264  # of a recheck
    recheck_warps: int = 4

    def even(self, d: int) -> bool:
        return d == self.BLOCK_D * self.CHUNKS


def configure(problem: Problem, multiprocessors: int, shared: int) -> Config:
    """The configuration of a search, for so many bytes of shared memory.

    Rows of 256 channels and less in half precision stay where they are while the codes pass by.
    64 codes at a time leave room for two programs on a multiprocessor, up to 128 channels: one's
    products hide the other's minima. The rest goes through both by channels, fewer of them where
    each has an address of its own. Splits are as many as give a multiprocessor two programs.
    """
    p = problem
    half = p.dtype.itemsize == 2
    BLOCK_N, BLOCK_K = 128, 64
    BLOCK_D = min(256, max(64, triton.next_power_of_2(p.d))) if half else 32
    num_stages = 2 if BLOCK_D == 256 else 3
    whole = (BLOCK_N + num_stages * BLOCK_K) * BLOCK_D * p.dtype.itemsize
    if not p.vectors:
        BLOCK_D, num_stages = (32, 2) if half else (16, 2)
    elif p.d > BLOCK_D or whole > shared:
        BLOCK_D, num_stages = (64, 3) if half else (32, 3)
    CHUNKS = triton.cdiv(p.d, BLOCK_D)
    blocks = p.heads * triton.cdiv(p.N, BLOCK_N)
    SPLITS = min(triton.cdiv(p.K, BLOCK_K), max(1, 2 * multiprocessors // blocks))
    programs = max(1, 2 * multiprocessors // p.heads)
    config = Config(BLOCK_N, BLOCK_K, BLOCK_D, CHUNKS, 8, num_stages, SPLITS, programs=programs)
    return config if p.vectors else config._replace(recheck_warps=8)  # addresses take registers


def configure_interpreted(problem: Problem, multiprocessors: int, shared: int) -> Config:
    """For Triton's interpreter: few programs, and tiles that small inputs have several of."""
    del multiprocessors, shared
    BLOCK_D = min(64, max(16, triton.next_power_of_2(problem.d)))
    CHUNKS = triton.cdiv(problem.d, BLOCK_D)
    SPLITS = 2 if problem.N <= 16 and problem.K > 128 else 1
    return Config(64, 64, BLOCK_D, CHUNKS, 4, 1, SPLITS, BLOCK_R=32, programs=3)


class Bounds(NamedTuple):
    """E = length (eps |X| + ..) + weight + shared |X|^2 + tiny (1 + |X|), weight of bias_eps."""

    eps: float
    bias_eps: float
    shared: float
    tiny: float


def bounds(d: int, metric: str, dtype: torch.dtype) -> Bounds:
    """The README derives them."""
    if d > WIDEST:
        return Bounds(*[float("inf")] * 4)
    sums = 1.25 * (d + 32) * 2.0**-23
    eps = sums
    if dtype == torch.float32:
        eps = 3 * sums + 3.25 * 2.0**-16
    if metric == "cosine":
        eps += (d + 32) * 2.0**-23
    return Bounds(eps, sums, (d + 32) * 2.0**-52, (d + 32) * 2.0**-120)


def search(x: Tensor, codebook: Tensor, metric: str, precision: str) -> Tensor:
    """x [H, N, d], codebook [H, K, d] -> int64 [H, N]."""
    parts = zip(x.split(HEADS), codebook.split(HEADS), strict=True)
    with launching_on(x):
        found = [_Search(*part, metric, precision == "exact").run() for part in parts]
    return found[0] if len(found) == 1 else torch.cat(found)


class _Search:
    def __init__(self, x: Tensor, codebook: Tensor, metric: str, exact: bool) -> None:
        self.x, self.codebook, self.exact = x, codebook, exact
        self.H, self.N, self.d = x.shape
        self.K = codebook.shape[1]
        self.l2, self.cosine = metric == "l2", metric == "cosine"
        vectors = _has_vectors(x) and _has_vectors(codebook)
        problem = Problem(self.H, self.N, self.K, self.d, x.dtype, vectors)
        rule = configure_interpreted if dispatch.interpreting() else configure
        self.config = rule(problem, multiprocessors(x.device), shared_memory(x.device))
        self.bounds = bounds(self.d, metric, x.dtype)
        self.tiles = triton.cdiv(self.K, self.config.BLOCK_K)
        self.count = self.new(self.H, dtype=torch.int32)
        self.first = self.new(self.H, dtype=torch.int64).fill_(self.K)
        self.found = self.new(self.H, self.N, dtype=torch.int64)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def run(self) -> Tensor:
        facts = self.describe_codes()
        listed = self.certify(self.search(facts))
        if self.exact:
            self.recheck(facts, *listed)
        return self.found

    def describe_codes(self) -> tuple[Tensor | None, ...]:
        """The mean, each code's bias and scale, each tile's bounds."""
        c = self.config
        padded = self.tiles * c.BLOCK_K
        mean = self.new(self.H, self.d) if self.l2 else None
        bias, tile = self.new(self.H, padded), self.new(self.H, self.tiles, 2)
        scale = self.new(self.H, padded) if self.cosine else None
        single = self.x.dtype == torch.float32
        # NONE spoils no second best, but a product with the last code, if huge, may outweigh it.
        absent = NONE.value if self.exact else float("nan")
        if mean is not None:
            step = triton.cdiv(self.K, SAMPLES)
            mean_kernel[(triton.cdiv(self.d, 16), self.H)](
                self.codebook, mean, self.K, self.d, step, *self.codebook.stride(),
                RATIO[single], SAMPLES=SAMPLES, BLOCK_D=16, num_warps=4,
            )  # fmt: skip
        codes_kernel[(self.tiles, self.H)](
            self.codebook, mean, bias, scale, tile, self.first, self.count,
            self.K, self.d, self.tiles, *self.codebook.stride(), self.bounds.bias_eps, absent,
            BLOCK_K=c.BLOCK_K, BLOCK_D=64, L2=self.l2, SINGLE=single, num_warps=4,
        )  # fmt: skip
        return mean, bias, scale, tile

    def search(self, facts: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Of each split, and row: bounds of its best and second best score, and the former's."""
        c = self.config
        shape = self.H, c.SPLITS, self.N
        index = self.new(*shape, dtype=torch.int64)
        lower = self.new(*shape)
        upper, second = (self.new(*shape) if self.exact else None for _ in range(2))
        blocks = triton.cdiv(self.N, c.BLOCK_N)
        search_kernel[(blocks * c.SPLITS * self.H,)](
            self.x, self.codebook, *facts, lower, upper, second, index,
            self.N, self.K, self.d, c.SPLITS, triton.cdiv(self.tiles, c.SPLITS),
            *self.x.stride(), *self.codebook.stride(), *self._row_bounds(),
            EXACT=self.exact, CENTRED=self.l2, SINGLE=self.x.dtype == torch.float32,
            BLOCK_N=c.BLOCK_N, BLOCK_K=c.BLOCK_K, BLOCK_D=c.BLOCK_D, CHUNKS=c.CHUNKS,
            EVEN=c.even(self.d), num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
        return lower, upper, second, index

    def certify(self, partial: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Fill `found`; each row's bar, and a list of the rows that are not certain."""
        bar = self.new(self.H, self.N) if self.exact else None
        rows = self.new(self.H, self.N, dtype=torch.int64) if self.exact else None
        certify_kernel[(triton.cdiv(self.N, ROWS), self.H)](
            *partial, self.first, self.found, bar, rows, self.count,
            self.N, self.K, self.config.SPLITS, EXACT=self.exact, BLOCK_N=ROWS, num_warps=4,
        )  # fmt: skip
        return bar, rows

    def recheck(
        self, facts: tuple[Tensor | None, ...], bar: Tensor | None, rows: Tensor | None
    ) -> None:
        c = self.config
        room = max(c.programs, triton.cdiv(self.N, c.BLOCK_R))
        cost = self.new(self.H, room, c.BLOCK_R, dtype=torch.float64)
        index = self.new(self.H, room, c.BLOCK_R, dtype=torch.int64)
        recheck_kernel[(c.programs, self.H)](
            self.x, self.codebook, *facts, bar, rows, self.count, cost, index,
            self.N, self.K, self.d, room,
            *self.x.stride(), *self.codebook.stride(), *self._row_bounds(),
            L2=self.l2, CENTRED=self.l2, SINGLE=self.x.dtype == torch.float32,
            BLOCK_N=c.BLOCK_R, BLOCK_K=c.BLOCK_K, BLOCK_D=c.BLOCK_D, BLOCK_E=c.BLOCK_E,
            CHUNKS=c.CHUNKS, EVEN=c.even(self.d),
            num_warps=c.recheck_warps, num_stages=RECHECK_STAGES,
        )  # fmt: skip
        settle_kernel[(c.programs, self.H)](
            rows, self.count, cost, index, self.found, self.N, room, c.programs, self.tiles,
            BLOCK_N=c.BLOCK_R, num_warps=4,
        )  # fmt: skip

    def _row_bounds(self) -> tuple[float, float, float]:
        return self.bounds.eps, self.bounds.shared, self.bounds.tiny


def _has_vectors(x: Tensor) -> bool:
    """As Triton sees it: it asks whether numbers are multiples of 16."""
    outer = (stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1)
    whole = all(stride == 1 or stride % 16 == 0 for stride in outer)
    return x.stride(-1) == 1 and x.shape[-1] % 16 == 0 and whole and x.data_ptr() % 16 == 0


def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have; 64 KiB for the CPU of Triton's interpreter."""
    if device.type != "cuda":
        return 64 << 10
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 64 << 10))
