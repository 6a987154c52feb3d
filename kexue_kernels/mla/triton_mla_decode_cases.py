"""Configurations of mla_decode's Triton kernels that are compiled offline."""

from typing import NamedTuple

import torch

from kexue_kernels.mla.fp8 import row_bytes
from kexue_kernels.mla.triton_mla_decode import JOIN_V, JOIN_WARPS, Config, Target, configure
from kexue_kernels.offline import TritonCase

_MODULE = "kexue_kernels.mla.triton_mla_decode_kernel:"
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_STRIDES = ("qb", "qt", "qh", "qd", "block", "place", "channel")
_ARCHS: dict[Target, tuple[str, ...]] = {
    "sm_80": ("sm_80",),
    "sm_90": ("sm_90", "sm_100"),
    "amd": ("gfx942",),
}


class _Shape(NamedTuple):
    rows: int  # heads times query tokens
    columns: int  # of the value
    rest: int  # columns beyond it
    dtype: torch.dtype
    fp8: bool = False


_SHAPES = [
    _Shape(16, 512, 64, torch.bfloat16),
    _Shape(32, 512, 64, torch.float16),
    _Shape(128, 512, 64, torch.bfloat16),
    _Shape(128, 256, 32, torch.bfloat16),
    _Shape(16, 512, 64, torch.float32),
    _Shape(20, 200, 0, torch.bfloat16),
    _Shape(16, 512, 64, torch.bfloat16, fp8=True),
    _Shape(128, 512, 64, torch.bfloat16, fp8=True),
]


def compile_cases() -> list[TritonCase]:
    """A case for each configuration of a shape, for the targets that share it."""
    found = []
    for shape in _SHAPES:
        archs: dict[Config, tuple[str, ...]] = {}
        for target, own in _ARCHS.items():
            pages = torch.uint8 if shape.fp8 else shape.dtype
            config = configure(shape.rows, shape.columns, pages, target)
            archs[config] = archs.get(config, ()) + own
        found += [_decode(config, shape, archs[config]) for config in archs]
    return [*found, _join()]


def _decode(config: Config, shape: _Shape, archs: tuple[str, ...]) -> TritonCase:
    columns, rest, dtype = shape[1:4]
    BLOCK_V = 1 << (columns - 1).bit_length()
    arguments: dict[str, object] = {
        "q_ptr": f"*{_NAMES[dtype]}",
        "pages_ptr": "*u8" if shape.fp8 else f"*{_NAMES[dtype]}",
        "table_ptr": "*i32",
        "seqlens_ptr": "*i32",
        "out_ptr": "*fp32",
        "lse_ptr": "*fp32",
    }
    sizes = (
        "B",
        "Tq",
        "H",
        "head_dim_v",
        "rest",
        "num_blocks",
        "block_size",
        "max_blocks",
        "splits",
    )
    arguments |= dict.fromkeys(sizes, "i32") | {"scale": "fp32"}
    arguments |= {f"stride_{axis}": "i32" for axis in _STRIDES}
    arguments |= {"stride_qd": 1, "stride_channel": 1, "CAUSAL": True}
    arguments |= {"BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, "BLOCK_V": BLOCK_V}
    arguments |= {"BLOCK_R": rest, "EVEN_V": columns == BLOCK_V, "EVEN_R": True}
    arguments |= {"FP8": shape.fp8}
    if rest == 0:
        arguments["rest"] = 0
    data = "fp8" if shape.fp8 else str(dtype).removeprefix("torch.")
    name = f"{config.BLOCK_M} rows {columns}+{rest} {data}"
    flops = 2 * config.BLOCK_M * (2 * columns + rest) / (columns + rest)
    row = row_bytes(columns, rest) if shape.fp8 else dtype.itemsize * (columns + rest)
    costs = row / (columns + rest), flops
    return _case(name, "decode_kernel", arguments, config[2:], costs, archs)


def _join() -> TritonCase:
    arguments: dict[str, object] = {"parts_ptr": "*fp32", "part_lse_ptr": "*fp32"}
    arguments |= {"out_ptr": "*bf16", "lse_ptr": "*fp32"}
    arguments |= dict.fromkeys(("B", "Tq", "H", "head_dim_v", "splits"), "i32")
    arguments |= {"BLOCK_S": 128, "BLOCK_V": JOIN_V}
    return _case("join bfloat16", "join_kernel", arguments, (JOIN_WARPS, 3), (4, 2), ())


def _case(
    name: str,
    kernel: str,
    arguments: dict[str, object],
    schedule: tuple[int, int],
    costs: tuple[float, float],
    archs: tuple[str, ...],
) -> TritonCase:
    types = {k: t for k, t in arguments.items() if isinstance(t, str)}
    aligned = ("head_dim_v", "stride_qb", "stride_qt", "stride_qh", "stride_block", "stride_place")
    return TritonCase(
        op="mla_decode",
        name=name,
        kernel=_MODULE + kernel,
        signature={k: types.get(k, "constexpr") for k in arguments},
        constexprs={k: value for k, value in arguments.items() if k not in types},
        num_warps=schedule[0],
        num_stages=schedule[1],
        bytes_per_element=costs[0],
        flops_per_element=costs[1],
        divisible_by_16=tuple(k for k, t in types.items() if t[0] == "*" or k in aligned),
        archs=archs,
    )
