"""Configurations of mla_attention's Triton kernels that are compiled offline."""

from typing import NamedTuple

import torch

from kexue_kernels.mla.triton_mla_attention import (
    DELTA_ROWS,
    DELTA_WARPS,
    Config,
    Kernel,
    Target,
    configure,
    widths,
)
from kexue_kernels.offline import TritonCase

_MODULE = "kexue_kernels.mla.triton_mla_attention"
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_ARCHS: dict[Target, str] = {
    "sm_80": "sm_80",
    "sm_90": "sm_90",
    "sm_100": "sm_100",
    "amd": "gfx942",
}
_TOKENS = 8192  # for the roofline, causal
_READ: dict[Kernel, tuple[str, ...]] = {
    "forward": ("q", "q_rope", "k", "k_rope", "v"),
    "keys": ("q", "q_rope", "k", "k_rope", "v", "grad"),
    "queries": ("q", "q_rope", "k", "k_rope", "v", "grad"),
}
_FLOAT: dict[Kernel, tuple[str, ...]] = {
    "forward": (),
    "keys": ("lse", "delta"),
    "queries": ("lse", "delta"),
}
_WRITTEN: dict[Kernel, tuple[str, ...]] = {
    "forward": ("out", "lse"),
    "keys": ("dk", "dk_rope", "dv"),
    "queries": ("dq", "dq_rope"),
}
_SINGLE = {("forward", "lse"), ("keys", "dk_rope")}  # written in float32, whatever comes in


class _Shape(NamedTuple):
    dk: int
    dr: int
    dv: int
    dtype: torch.dtype
    causal: bool = True
    packed: bool = False
    targets: tuple[Target, ...] = ("sm_80", "sm_90", "sm_100", "amd")


_SHAPES = [
    _Shape(128, 64, 128, torch.bfloat16),
    _Shape(128, 64, 128, torch.float32),
    _Shape(40, 24, 72, torch.float16, causal=False, packed=True, targets=("sm_90", "amd")),
]


def compile_cases() -> list[TritonCase]:
    """A case for each configuration of a shape, for the targets that share it."""
    found = []
    for shape in _SHAPES:
        width = widths(*shape[:3])
        for kernel in _READ:
            archs: dict[Config, tuple[str, ...]] = {}
            for target in shape.targets:
                config = configure(kernel, width, shape.dtype, target)
                archs[config] = (*archs.get(config, ()), _ARCHS[target])
            found += [_case(kernel, shape, config, archs[config]) for config in archs]
    return [*found, _delta()]


def _case(kernel: Kernel, shape: _Shape, config: Config, archs: tuple[str, ...]) -> TritonCase:
    data = f"*{_DTYPES[shape.dtype]}"
    arguments: dict[str, object] = {f"{name}_ptr": data for name in _READ[kernel]}
    arguments |= {f"{name}_ptr": "*fp32" for name in _FLOAT[kernel]}
    for name in _WRITTEN[kernel]:
        arguments[f"{name}_ptr"] = "*fp32" if (kernel, name) in _SINGLE else data
    arguments |= {"sequences_ptr": "*i32", "cu_seqlens_ptr": "*i32"}
    arguments |= dict.fromkeys(("T", "H", "dk", "dr", "dv"), "i32") | {"scale": "fp32"}
    for x in "qr" if kernel == "forward" else "qrg":
        arguments |= {f"stride_{x}{axis}": "i32" for axis in "bth"} | {f"stride_{x}d": 1}
    width = widths(*shape[:3])
    even = (size == block for size, block in zip(shape[:3], width, strict=True))
    constants: dict[str, object] = {"CAUSAL": shape.causal, "VARLEN": shape.packed}
    constants |= {"PRECISION": "ieee", "BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N}
    constants |= width._asdict()
    constants |= dict(zip(("EVEN_D", "EVEN_R", "EVEN_V"), even, strict=True))
    kind = str(shape.dtype).removeprefix("torch.")
    name = f"{kernel} {shape.dk}+{shape.dr}/{shape.dv} {kind} {'x'.join(map(str, config))}"
    costs = _costs(kernel, shape)
    file = "_kernel" if kernel == "forward" else "_backward_kernel"
    entry = f"{_MODULE}{file}:{kernel}_kernel"
    whole = all(size % 16 == 0 for size in shape[:3])
    return _compiled(name, entry, arguments, constants, config[2:], costs, archs, whole)


def _costs(kernel: Kernel, shape: _Shape) -> tuple[float, float]:
    """Bytes and FLOPs for each number of a head's query, in a sequence of _TOKENS."""
    width = shape.dk + shape.dr
    tensors = {"forward": (2, 2), "keys": (3, 3), "queries": (3, 2)}[kernel]  # as wide as q, as v
    products = {"forward": (1, 1), "keys": (2, 2), "queries": (2, 1)}[kernel]
    moved = tensors[0] * width + tensors[1] * shape.dv
    multiplied = products[0] * width + products[1] * shape.dv
    return shape.dtype.itemsize * moved / width, _TOKENS * multiplied / width


def _delta() -> TritonCase:
    arguments: dict[str, object] = {"grad_ptr": "*bf16", "out_ptr": "*bf16", "delta_ptr": "*fp32"}
    arguments |= dict.fromkeys(("B", "T", "H", "dv"), "i32")
    arguments |= {f"stride_g{axis}": "i32" for axis in "bth"} | {"stride_gd": 1}
    constants: dict[str, object] = {"BLOCK_M": DELTA_ROWS, "BLOCK_V": 128}
    entry = f"{_MODULE}_backward_kernel:delta_kernel"
    return _compiled("delta", entry, arguments, constants, (DELTA_WARPS, 3), (4, 2), ())


def _compiled(
    name: str,
    entry: str,
    arguments: dict[str, object],
    constants: dict[str, object],
    schedule: tuple[int, int],
    costs: tuple[float, float],
    archs: tuple[str, ...],
    whole: bool = True,
) -> TritonCase:
    types = {k: t for k, t in arguments.items() if isinstance(t, str)}
    aligned = ("dk", "dr", "dv", *(k for k in types if k.startswith("stride_"))) if whole else ()
    fixed = {k: v for k, v in arguments.items() if k not in types} | constants
    return TritonCase(
        op="mla_attention",
        name=name,
        kernel=entry,
        signature={k: types.get(k, "constexpr") for k in (*arguments, *fixed)},
        constexprs=fixed,
        num_warps=schedule[0],
        num_stages=schedule[1],
        bytes_per_element=costs[0],
        flops_per_element=costs[1],
        divisible_by_16=tuple(k for k, t in types.items() if t[0] == "*" or k in aligned),
        archs=archs,
    )
