"""The configurations of vector_quantize's Triton kernels that are compiled offline."""

from dataclasses import dataclass

from kexue_kernels.offline import TritonCase
from kexue_kernels.vq.triton_vector_quantize import (
    MEAN_BLOCK,
    MEAN_WARPS,
    NUM_STAGES,
    configure,
)

_KERNELS = "kexue_kernels.vq.triton_vector_quantize_kernel"
_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class _Variant:
    data: str = "bfloat16"
    d: int = 256
    rotation: bool = True

    def __str__(self) -> str:
        config = configure(self.d)
        return f"{self.data}-d{self.d}-{config.ROWS}x{config.BLOCK_D}"


def compile_cases() -> list[TritonCase]:
    forward = [_Variant("float32"), _Variant(), _Variant("float16", 20)]
    backward = [
        _Variant("float32"),
        _Variant(),
        _Variant(rotation=False),
        _Variant("float16", 20),
        _Variant("float32", 2000),
        _Variant("float32", 4096),
    ]
    return [*map(_forward, forward), _mean(), *map(_backward, backward)]


def _forward(v: _Variant) -> TritonCase:
    data, config = f"*{_TYPES[v.data]}", configure(v.d)
    arguments: dict[str, object] = {"x_ptr": data, "codebook_ptr": data, "indices_ptr": "*i64"}
    arguments |= {"quantized_ptr": data, "squares_ptr": "*fp32", "counts_ptr": "*i32"}
    arguments |= dict.fromkeys("NKd", "i32")
    arguments |= {"ROWS": config.ROWS, "BLOCK_D": config.BLOCK_D}
    size = _SIZES[v.data]
    return _case("forward", str(v), arguments, config.num_warps, v.d, (3 * size, 3))


def _backward(v: _Variant) -> TritonCase:
    data, config = f"*{_TYPES[v.data]}", configure(v.d)
    arguments: dict[str, object] = {"g_ptr": data, "x_ptr": data, "codebook_ptr": data}
    arguments |= {"indices_ptr": "*i64", "scale_ptr": "*fp32", "terms_ptr": "*i64"}
    arguments |= {"grad_ptr": data, **dict.fromkeys("NKd", "i32"), "g_row": "i32", "g_column": 1}
    arguments |= {"ROTATION": v.rotation, "WHOLE": v.d <= config.BLOCK_D}
    arguments |= {"ROWS": config.ROWS, "BLOCK_D": config.BLOCK_D}
    name = f"{v}-{'rotation' if v.rotation else 'ste'}"
    size = _SIZES[v.data]
    flops = 24 if v.rotation else 3
    return _case("backward", name, arguments, config.num_warps, v.d, (4 * size, flops))


def _mean() -> TritonCase:
    arguments: dict[str, object] = {"squares_ptr": "*fp32", "counts_ptr": "*i32"}
    arguments |= {"mean_ptr": "*fp32", "programs": "i32", "d": "i32", "BLOCK": MEAN_BLOCK}
    return _case("mean", str(MEAN_BLOCK), arguments, MEAN_WARPS, 256, (8, 2))


def _case(
    kernel: str,
    name: str,
    arguments: dict[str, object],
    num_warps: int,
    d: int,
    cost: tuple[int, int],
) -> TritonCase:
    """`cost`: bytes and FLOPs an element."""
    types = {k: t for k, t in arguments.items() if isinstance(t, str)}
    whole = ("d", "g_row") if d % 16 == 0 else ()
    return TritonCase(
        op="vector_quantize",
        name=f"{kernel}-{name}",
        kernel=f"{_KERNELS}:{kernel}_kernel",
        signature={k: types.get(k, "constexpr") for k in arguments},
        constexprs={k: value for k, value in arguments.items() if k not in types},
        num_warps=num_warps,
        num_stages=NUM_STAGES,
        bytes_per_element=cost[0],
        flops_per_element=cost[1],
        divisible_by_16=tuple(k for k, t in types.items() if t[0] == "*" or k in whole),
    )
