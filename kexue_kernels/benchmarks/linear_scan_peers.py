"""Who computes linear_scan: this package's backends, plain PyTorch, and other packages.

No peer takes a packed batch or a time-invariant decay. They get one long sequence whose decay
is zero where a packed one starts, and the decay in full; making that is not timed.
"""

import importlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import kexue_kernels as kk
from kexue_kernels.benchmarks.case import Contestant, Function, Inputs, same
from kexue_kernels.checks import state_dtype

LOOP = "torch loop"
PSCAN = "mambapy pscan"
ASSOCIATIVE = "torch associative_scan"
WARP = "accelerated-scan warp"
HGRN = "fla chunk_hgrn"

BLOCK = 1024  # steps of a block in `blocks`
LONGEST_LOOP = 65536
HALVES = (torch.bfloat16, torch.float16)
Pair = tuple[Tensor, Tensor]


def ours(backend: str) -> Contestant:
    status = kk.backends().get(backend)  # none for "auto"
    unfit = "" if status is None or status.available else status.reason
    return Contestant(
        f"kexue {backend}", lambda: partial(_linear_scan, backend=backend), ours=True, unfit=unfit
    )


def loop(L: int) -> Contestant:
    """The recurrence as users write it, a step at a time."""
    return peer(LOOP, lambda: steps, unfit=f"{L} Python steps" if L > LONGEST_LOOP else "")


def blocked() -> Contestant:
    """A reference for sequences too long to step through one by one."""
    return peer("torch blocks", lambda: blocks)


def mambapy() -> Contestant:
    """pscan on [B, L, D, N] with N = 1; halves through float32, as its sums are kept in place."""

    def load() -> Function:
        return widened(importlib.import_module("mambapy.pscan").pscan)

    return peer(
        PSCAN,
        load,
        package="mambapy",
        to_own=lambda x: x.unsqueeze(-1),
        to_case=lambda x: x.squeeze(-1),
    )


def associative_scan() -> Contestant:
    """PyTorch's prototype, eager; combine_mode="pointwise" gives wrong gradients."""

    def load() -> Function:
        module = importlib.import_module("torch._higher_order_ops.associative_scan")

        def scan(a: Tensor, b: Tensor) -> Tensor:
            pairs = module.associative_scan(_compose, (a, b), dim=1, combine_mode="generic")
            return pairs[1]

        return widened(scan)

    return peer(ASSOCIATIVE, load, slow=True)


def accelerated_scan(L: int, dtype: torch.dtype) -> list[Contestant]:
    """Its CUDA and Triton kernels, on [B, D, L]."""
    power_of_two = L & (L - 1) == 0 and 32 <= L <= 65536
    unfit = "" if power_of_two else f"takes powers of two from 32 to 65536, not L = {L}"
    if dtype.is_complex:
        return [_accelerated("accelerated-scan complex", "complex")]
    found = [
        _accelerated(WARP, "warp", unfit=unfit),
        _accelerated("accelerated-scan scalar", "scalar"),
    ]
    if dtype in HALVES:
        found.insert(1, _accelerated(f"{WARP}, in float32", "warp", unfit, widen=True))
    return found


def hgrn(dtype: torch.dtype, packed: bool) -> Contestant:
    """chunk_hgrn takes the logarithm of the decay; the gradient goes back by d log a = da / a."""

    def load() -> Function:
        chunk_hgrn = importlib.import_module("fla.ops.hgrn").chunk_hgrn
        return lambda log_a, b: chunk_hgrn(b, log_a)[0]

    def prepare(inputs: Inputs) -> Pair:
        a, b = in_full(inputs)
        return a.float().log().to(a.dtype), b

    def chain(gradients: tuple[Tensor, ...], inputs: Inputs) -> Pair:
        grad_log_a, grad_b = gradients
        return grad_log_a / in_full(inputs)[0], grad_b

    unfit = "takes real numbers" if dtype.is_complex else "takes no zero decay" if packed else ""
    return Contestant(HGRN, load, package="fla", unfit=unfit, prepare=prepare, chain=chain)


def peer(
    name: str,
    load: Callable[[], Function],
    package: str = "",
    unfit: str = "",
    slow: bool = False,
    to_own: Callable[[Tensor], Tensor] = same,
    to_case: Callable[[Tensor], Tensor] = same,
) -> Contestant:
    def prepare(inputs: Inputs) -> tuple[Tensor, ...]:
        return tuple(to_own(x) for x in in_full(inputs))

    def chain(gradients: tuple[Tensor, ...], inputs: Inputs) -> Pair:
        grad_a, grad_b = (to_case(x) for x in gradients)
        return zero_at_starts(grad_a, inputs), grad_b

    return Contestant(
        name,
        load,
        package=package,
        unfit=unfit,
        slow=slow,
        prepare=prepare,
        to_own=to_own,
        to_case=to_case,
        chain=chain,
    )


def in_full(inputs: Inputs) -> Pair:
    a, b = inputs["a"], inputs["b"]
    return zero_at_starts(a.expand(b.shape).contiguous(), inputs), b


def zero_at_starts(x: Tensor, inputs: Inputs) -> Tensor:
    """x [B, L, D] with zeros at the first step of every packed sequence."""
    if "cu_seqlens" not in inputs:
        return x
    starts = inputs["cu_seqlens"][:-1].to(torch.int64)
    return x.index_fill(1, starts[starts < x.shape[1]], 0)


def steps(a: Tensor, b: Tensor) -> Tensor:
    """h [B, L, D], state in float32. Unbound first: `a[:, t]` in the loop makes autograd's
    backward fill L tensors of [B, L, D]."""
    wide = state_dtype(b.dtype)
    h, out = b.new_zeros((), dtype=wide), []
    for a_t, b_t in zip(a.to(wide).unbind(1), b.to(wide).unbind(1), strict=True):
        h = a_t * h + b_t
        out.append(h)
    return torch.stack(out, dim=1).to(b.dtype)


def blocks(a: Tensor, b: Tensor) -> Tensor:
    """As `steps`, where BLOCK divides L: every block at once, then from block to block."""
    wide = state_dtype(b.dtype)
    a, x = (y.to(wide).unflatten(1, (-1, BLOCK)).transpose(1, 2) for y in (a, b))
    decay = torch.cumprod(a, dim=1)  # [B, BLOCK, L / BLOCK, D]
    h = steps(a, x)
    leaves = steps(decay[:, -1], h[:, -1])  # the state after each block, [B, L / BLOCK, D]
    enters = torch.cat([torch.zeros_like(leaves[:, :1]), leaves[:, :-1]], dim=1)
    return (h + decay * enters[:, None]).transpose(1, 2).flatten(1, 2).to(b.dtype)


def widened(scan: Function) -> Function:
    """`scan` with halves through float32, for those that sum in the dtype they are given."""

    def call(a: Tensor, b: Tensor) -> Tensor:
        wide = state_dtype(b.dtype)
        return scan(a.to(wide), b.to(wide)).to(b.dtype)

    return call


def _linear_scan(a: Tensor, b: Tensor, cu_seqlens: Tensor | None = None, *, backend: str) -> Tensor:
    h = kk.linear_scan(a, b, cu_seqlens=cu_seqlens, backend=backend)
    assert isinstance(h, Tensor)
    return h


def _compose(first: Pair, second: Pair) -> Pair:
    return first[0] * second[0], second[0] * first[1] + second[1]


def _accelerated(name: str, module: str, unfit: str = "", widen: bool = False) -> Contestant:
    def load() -> Function:
        scan: Function = importlib.import_module(f"accelerated_scan.{module}").scan
        return widened(scan) if widen else scan

    return peer(
        name,
        load,
        package="accelerated_scan",
        unfit=unfit,
        to_own=_channels_first,
        to_case=_channels_first,
    )


def _channels_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()
