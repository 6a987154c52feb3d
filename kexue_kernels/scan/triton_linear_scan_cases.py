"""Every configuration of linear_scan's Triton kernel that the launcher can choose."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from kexue_kernels.offline import TritonCase
from kexue_kernels.scan.triton_linear_scan import (
    HALVES,
    NUM_STAGES,
    Config,
    Problem,
    configure,
    one,
)

_KERNEL = "kexue_kernels.scan.triton_linear_scan_kernel:linear_scan_kernel"
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_STRIDES = ("D", *(f"{x}_{axis}" for x in "abh" for axis in ("batch", "step")))
_H200 = 132  # multiprocessors


@dataclass(frozen=True)
class _Variant:
    dtype: torch.dtype = torch.float32
    paired: bool = False
    backward: bool = False
    invariant: bool = False
    chained: bool = True
    reverse: bool = False
    packed: bool = False
    L: int = 16384
    D: int = 1536

    @property
    def config(self) -> Config:
        sequences = 8 if self.chained else 1 if self.packed else 256
        problem = Problem(
            sequences,
            self.L,
            self.D,
            self.dtype,
            self.paired,
            self.invariant,
            self.backward,
            self.packed,
        )
        config = configure(problem, _H200)
        assert config.chained == self.chained
        return config

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch."), "backward" if self.backward else "forward"]
        flags = {"pairs": self.paired, "invariant": self.invariant, "reverse": self.reverse}
        flags |= {"packed": self.packed, "chained": self.chained, "serial": not self.chained}
        parts += [name for name, on in flags.items() if on]
        config = self.config
        return "-".join([*parts, f"{config.BLOCK_L}x{config.BLOCK_D}"])


def compile_cases() -> list[TritonCase]:
    return [_case(variant) for variant in _variants()]


def _variants() -> Iterator[_Variant]:
    both = (False, True)
    formats = [(torch.float32, False), (torch.complex64, False)]
    formats += [(dtype, True) for dtype in HALVES]
    for (dtype, paired), backward, invariant, chained in product(formats, both, both, both):
        yield _Variant(dtype, paired, backward, invariant, chained)
    for backward, chained in product(both, both):
        yield _Variant(torch.bfloat16, False, backward, chained=chained)
        yield _Variant(backward=backward, chained=chained, reverse=True)
        L = 16384 if chained else 500
        yield _Variant(backward=backward, chained=chained, packed=True, L=L)
    for backward in both:
        yield _Variant(torch.bfloat16, True, backward, chained=False, L=64)
        yield _Variant(backward=backward, D=1)
        yield _Variant(backward=backward, D=4)


def _case(variant: _Variant) -> TritonCase:
    config = variant.config
    arguments = _arguments(variant, config)
    types = {k: v for k, v in arguments.items() if isinstance(v, str)}
    whole = variant.D % 16 == 0
    reads, writes = (2, 1) if not variant.backward else (3, 2)
    complex_ = variant.dtype.is_complex
    step, product_ = (8, 6) if complex_ else (2, 1)
    return TritonCase(
        op="linear_scan",
        name=str(variant),
        kernel=_KERNEL,
        signature={k: types.get(k, "constexpr") for k in arguments},
        constexprs={k: v for k, v in arguments.items() if k not in types},
        num_warps=config.num_warps,
        num_stages=NUM_STAGES,
        bytes_per_element=(reads + writes - variant.invariant * (1 + variant.backward))
        * variant.dtype.itemsize,
        flops_per_element=step + variant.backward * (step if variant.invariant else product_),
        divisible_by_16=tuple(
            k for k, v in types.items() if v[0] == "*" or (k in _STRIDES and whole)
        ),
    )


def _arguments(variant: _Variant, config: Config) -> dict[str, object]:
    """The kernel's arguments in order: a type, or a constant. Inputs are whole and contiguous."""
    data = "*i64" if variant.dtype.is_complex else f"*{_NAMES[variant.dtype]}"
    read = "*i32" if variant.paired else data
    state = "*i64" if variant.dtype.is_complex else "*fp32"
    one_channel = variant.D == 1  # Triton takes an argument that is 1 for a constant
    strides = {"batch": "i32", "step": "i32", "channel": 1}
    if one_channel:
        strides |= {"step": 1, "channel": "i32"}
    backward = variant.backward
    return {
        "a_ptr": data if variant.invariant else read,
        "b_ptr": read,
        "x_ptr": data,
        "first_ptr": state,
        "last_ptr": state,
        "h_ptr": read if backward else None,
        "initial_ptr": state if backward else None,
        "grad_a_ptr": (state if variant.invariant else data) if backward else None,
        "cu_seqlens_ptr": "*i64" if variant.packed else None,
        "chain_ptr": "*i64" if config.chained else None,
        "L": "i32",
        "D": 1 if one_channel else "i32",
        "sequences": "i32",
        "rows": "i32",
        **{f"{x}_{axis}": stride for x in "abh" for axis, stride in strides.items()},
        "BACKWARD": backward,
        "INVARIANT": variant.invariant,
        "REVERSE": variant.reverse,
        "HALF": HALVES[variant.dtype] if variant.paired else None,
        "ONE": one(variant.dtype, variant.paired),
        "WINDOW": config.WINDOW,
        "RUN": config.RUN,
        "RUNS": config.RUNS,
        "BLOCK_D": config.BLOCK_D,
    }
