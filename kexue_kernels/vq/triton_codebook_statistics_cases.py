"""The configurations of codebook_statistics' Triton kernels that are compiled offline."""

from kexue_kernels.offline import TritonCase
from kexue_kernels.vq.triton_codebook_statistics import NUM_STAGES, PARTS, configure

_KERNELS = "kexue_kernels.vq.triton_codebook_statistics_kernel"
_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


def compile_cases() -> list[TritonCase]:
    found = []
    for data, d, differences in (
        ("float32", 256, False),
        ("bfloat16", 256, False),
        ("float32", 256, True),
        ("bfloat16", 256, True),
        ("float16", 20, True),
    ):
        found += [_chunk(data, d, differences), _join(data, d, differences)]
    return found


def _chunk(data: str, d: int, differences: bool) -> TritonCase:
    config = configure(d, differences)
    kind = f"*{_TYPES[data]}"
    arguments: dict[str, object] = {"x_ptr": kind, "codebook_ptr": kind if differences else None}
    arguments |= _scale(differences)
    arguments |= {"keys_ptr": "*i16", "order_ptr": "*i64", "starts_ptr": "*i64"}
    arguments |= {"out_ptr": kind if differences else "*fp32", "parts_ptr": "*fp32"}
    arguments |= {"K": "i32", "d": "i32", "chunk": "i32"}
    arguments |= {"BATCH": config.BATCH, "BLOCK_D": config.BLOCK_D}
    name = f"{_name(data, differences)}-{config.BATCH}x{config.BLOCK_D}"
    return _case("chunk_kernel", name, arguments, 1, d, _SIZES[data] * (1 + differences))


def _join(data: str, d: int, differences: bool) -> TritonCase:
    config = configure(d, differences)
    arguments: dict[str, object] = {"parts_ptr": "*fp32", **_scale(differences)}
    arguments |= {"keys_ptr": "*i16", "starts_ptr": "*i64"}
    arguments |= {"out_ptr": f"*{_TYPES[data]}" if differences else "*fp32"}
    arguments |= {"K": "i32", "d": "i32", "chunk": "i32"}
    arguments |= {"PARTS": PARTS, "BLOCK_D": config.JOIN_D}
    name = f"{_name(data, differences)}-{PARTS}x{config.JOIN_D}"
    return _case("join_kernel", name, arguments, 4, d, 4)


def _scale(given: bool) -> dict[str, object]:
    return {"scale_ptr": "*fp32" if given else None, "terms_ptr": "*i64" if given else None}


def _name(data: str, differences: bool) -> str:
    return f"{data}-{'differences' if differences else 'sums'}"


def _case(
    kernel: str, name: str, arguments: dict[str, object], num_warps: int, d: int, size: int
) -> TritonCase:
    types = {k: t for k, t in arguments.items() if isinstance(t, str)}
    whole = ("d",) if d % 16 == 0 else ()
    return TritonCase(
        op="codebook_statistics",
        name=f"{kernel.removesuffix('_kernel')}-{name}",
        kernel=f"{_KERNELS}:{kernel}",
        signature={k: types.get(k, "constexpr") for k in arguments},
        constexprs={k: value for k, value in arguments.items() if k not in types},
        num_warps=num_warps,
        num_stages=NUM_STAGES,
        bytes_per_element=size,
        flops_per_element=1,
        divisible_by_16=tuple(k for k, t in types.items() if t[0] == "*" or k in whole),
    )
