"""The configurations of ema_update_'s Triton kernels that are compiled offline."""

from kexue_kernels.offline import TritonCase
from kexue_kernels.vq.triton_ema_update import BLOCKS, NUM_STAGES, NUM_WARPS, SIZES, configure

_KERNELS = "kexue_kernels.vq.triton_ema_update_kernel"
_TYPES = {"float32": "fp32", "bfloat16": "bf16"}
_SIZES = {"float32": 4, "bfloat16": 2}


def compile_cases() -> list[TritonCase]:
    return [_size(), _mean("float32", 256), _mean("bfloat16", 20)]


def _size() -> TritonCase:
    arguments: dict[str, object] = {"size_ptr": "*fp32", "counts_ptr": "*i64"}
    arguments |= {"totals_ptr": "*fp32", "K": "i32", "weight": "fp32"}
    arguments |= {"size_group": "i32", "size_code": 1, "BLOCK": SIZES}
    return _case("size", str(SIZES), arguments, (16, 4), ())


def _mean(data: str, d: int) -> TritonCase:
    BLOCK_K, BLOCK_D = configure(d)
    arguments: dict[str, object] = {"codebook_ptr": f"*{_TYPES[data]}", "size_ptr": "*fp32"}
    arguments |= {"sum_ptr": "*fp32", "sums_ptr": "*fp32", "totals_ptr": "*fp32"}
    arguments |= {**dict.fromkeys(("K", "d", "blocks"), "i32"), "weight": "fp32", "eps": "fp32"}
    for name in ("code", "size", "sum"):
        axes = ("group", "code") if name == "size" else ("group", "code", "d")
        arguments |= {f"{name}_{axis}": "i32" for axis in axes}
        arguments[f"{name}_{axes[-1]}"] = 1
    arguments |= {"BLOCKS": BLOCKS, "BLOCK_K": BLOCK_K, "BLOCK_D": BLOCK_D}
    whole = ("d", "code_code", "sum_code") if d % 16 == 0 else ()
    return _case("mean", f"{data}-{BLOCK_K}x{BLOCK_D}", arguments, (12 + _SIZES[data], 4), whole)


def _case(
    kernel: str,
    name: str,
    arguments: dict[str, object],
    cost: tuple[int, int],
    whole: tuple[str, ...],
) -> TritonCase:
    """`cost`: bytes and FLOPs an element. `whole`: sizes and strides that are multiples of 16."""
    types = {k: t for k, t in arguments.items() if isinstance(t, str)}
    return TritonCase(
        op="ema_update",
        name=f"{kernel}-{name}",
        kernel=f"{_KERNELS}:{kernel}_kernel",
        signature={k: types.get(k, "constexpr") for k in arguments},
        constexprs={k: value for k, value in arguments.items() if k not in types},
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
        bytes_per_element=cost[0],
        flops_per_element=cost[1],
        divisible_by_16=tuple(k for k, t in types.items() if t[0] == "*" or k in whole),
    )
