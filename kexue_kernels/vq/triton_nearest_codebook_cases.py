"""The configurations of nearest_codebook's Triton kernels: each kind of tile, metric and dtype."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kexue_kernels.offline import TritonCase
from kexue_kernels.vq.triton_nearest_codebook import (
    RECHECK_STAGES,
    ROWS,
    SAMPLES,
    Config,
    Problem,
    configure,
)

_PACKAGE = "kexue_kernels.vq.triton_nearest_codebook"
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_N, _K = 65536, 8192
_H200 = 132, 227 << 10  # multiprocessors, and the shared memory that a program may have


@dataclass(frozen=True)
class _Variant:
    d: int
    dtype: torch.dtype = torch.bfloat16
    metric: str = "l2"
    exact: bool = True
    vectors: bool = True

    @property
    def config(self) -> Config:
        return configure(Problem(1, _N, _K, self.d, self.dtype, self.vectors), *_H200)

    def __str__(self) -> str:
        precision = "exact" if self.exact else "fast"
        dtype = str(self.dtype).removeprefix("torch.")
        strided = "" if self.vectors else "-strided"
        return f"{dtype}-{self.metric}-{precision}-d{self.d}{strided}"


_SEARCHES = (
    _Variant(64),
    _Variant(256),
    _Variant(768),
    _Variant(256, exact=False),
    _Variant(128, torch.float16),
    _Variant(64, metric="cosine"),
    _Variant(112, metric="dot"),
    _Variant(100, vectors=False),
    _Variant(100, torch.float32, vectors=False),
    _Variant(256, torch.float32),
    _Variant(64, torch.float32, exact=False),
    _Variant(32, torch.float32, "cosine"),
)
_RECHECKS = (
    _Variant(64),
    _Variant(256),
    _Variant(768, metric="cosine"),
    _Variant(256, torch.float32),
    _Variant(100, metric="cosine", vectors=False),
    _Variant(100, torch.float32, vectors=False),
)


def compile_cases() -> list[TritonCase]:
    return list(_cases())


def _cases() -> Iterator[TritonCase]:
    for v in _SEARCHES:
        c = v.config
        yield _case(v, "search", "", _search(v), c.num_warps, c.num_stages)
    for v in _RECHECKS:
        yield _case(v, "recheck", "_recheck", _recheck(v), v.config.recheck_warps, RECHECK_STAGES)
    single = _Variant(256, torch.float32, "cosine")
    for v in (_Variant(256), single):
        yield _case(v, "codes", "_codes", _codes(v), 4)
    yield _case(_Variant(256), "mean", "_codes", _mean(_Variant(256)), 4)
    for v in (_Variant(256), _Variant(256, exact=False)):
        yield _case(v, "certify", "", _certify(v), 4)
    yield _case(_Variant(256), "settle", "_recheck", _settle(_Variant(256)), 4)


def _case(
    variant: _Variant,
    kernel: str,
    module: str,
    arguments: dict[str, object],
    num_warps: int,
    num_stages: int = 3,
) -> TritonCase:
    types = {k: v for k, v in arguments.items() if isinstance(v, str)}
    whole = ("x_head", "x_row", "c_head", "c_code", "d") if variant.vectors else ()
    return TritonCase(
        op="nearest_codebook",
        name=f"{kernel}-{variant}",
        kernel=f"{_PACKAGE}{module}_kernel:{kernel}_kernel",
        signature={k: types.get(k, "constexpr") for k in arguments},
        constexprs={k: v for k, v in arguments.items() if k not in types},
        num_warps=num_warps,
        num_stages=num_stages,
        bytes_per_element=variant.dtype.itemsize + 8 / variant.d,
        flops_per_element=2 * _K,
        divisible_by_16=tuple(k for k, v in types.items() if v[0] == "*" or k in whole),
    )


def _search(v: _Variant) -> dict[str, object]:
    bounds = dict.fromkeys(("upper_ptr", "second_ptr"), "*fp32" if v.exact else None)
    return {
        **_facts(v),
        "lower_ptr": "*fp32",
        **bounds,
        "index_ptr": "*i64",
        **dict.fromkeys(("N", "K", "d", "splits", "tiles_per_split"), "i32"),
        **_strides(v, "x_head", "x_row", "x_channel"),
        **_strides(v, "c_head", "c_code", "c_channel"),
        **dict.fromkeys(("eps", "shared", "tiny"), "fp32"),
        "EXACT": v.exact,
        "CENTRED": v.metric == "l2",
        "SINGLE": v.dtype == torch.float32,
        "BLOCK_N": v.config.BLOCK_N,
        **_tile(v),
    }


def _recheck(v: _Variant) -> dict[str, object]:
    return {
        **_facts(v),
        "bar_ptr": "*fp32",
        "list_ptr": "*i64",
        "count_ptr": "*i32",
        "cost_ptr": "*fp64",
        "index_ptr": "*i64",
        **dict.fromkeys(("N", "K", "d", "room"), "i32"),
        **_strides(v, "x_head", "x_row", "x_channel"),
        **_strides(v, "c_head", "c_code", "c_channel"),
        **dict.fromkeys(("eps", "shared", "tiny"), "fp32"),
        "L2": v.metric == "l2",
        "CENTRED": v.metric == "l2",
        "SINGLE": v.dtype == torch.float32,
        "BLOCK_N": v.config.BLOCK_R,
        "BLOCK_E": v.config.BLOCK_E,
        **_tile(v),
    }


def _codes(v: _Variant) -> dict[str, object]:
    facts = _facts(v)
    del facts["x_ptr"]
    return {
        **facts,
        "first_ptr": "*i64",
        "count_ptr": "*i32",
        **dict.fromkeys(("K", "d", "tiles"), "i32"),
        **_strides(v, "c_head", "c_code", "c_channel"),
        "eps": "fp32",
        "absent": "fp32",
        "BLOCK_K": v.config.BLOCK_K,
        "BLOCK_D": 64,
        "L2": v.metric == "l2",
        "SINGLE": v.dtype == torch.float32,
    }


def _mean(v: _Variant) -> dict[str, object]:
    return {
        "codes_ptr": f"*{_NAMES[v.dtype]}",
        "mean_ptr": "*fp32",
        **dict.fromkeys(("K", "d", "step"), "i32"),
        **_strides(v, "c_head", "c_code", "c_channel"),
        "RATIO": "fp32",
        "SAMPLES": SAMPLES,
        "BLOCK_D": 16,
    }


def _certify(v: _Variant) -> dict[str, object]:
    exact = v.exact
    return {
        "lower_ptr": "*fp32",
        **dict.fromkeys(("upper_ptr", "second_ptr"), "*fp32" if exact else None),
        "index_ptr": "*i64",
        "first_ptr": "*i64",
        "found_ptr": "*i64",
        "bar_ptr": "*fp32" if exact else None,
        "list_ptr": "*i64" if exact else None,
        "count_ptr": "*i32",
        **dict.fromkeys(("N", "K", "splits"), "i32"),
        "EXACT": exact,
        "BLOCK_N": ROWS,
    }


def _settle(v: _Variant) -> dict[str, object]:
    return {
        "list_ptr": "*i64",
        "count_ptr": "*i32",
        "cost_ptr": "*fp64",
        "index_ptr": "*i64",
        "found_ptr": "*i64",
        **dict.fromkeys(("N", "room", "programs", "tiles"), "i32"),
        "BLOCK_N": v.config.BLOCK_R,
    }


def _facts(v: _Variant) -> dict[str, object]:
    data = f"*{_NAMES[v.dtype]}"
    return {
        "x_ptr": data,
        "codes_ptr": data,
        "mean_ptr": "*fp32" if v.metric == "l2" else None,
        "bias_ptr": "*fp32",
        "scale_ptr": "*fp32" if v.metric == "cosine" else None,
        "tile_ptr": "*fp32",
    }


def _strides(v: _Variant, head: str, row: str, channel: str) -> dict[str, object]:
    """Triton takes an argument that is 1 for a constant."""
    return {head: "i32", row: "i32", channel: 1 if v.vectors else "i32"}


def _tile(v: _Variant) -> dict[str, object]:
    c = v.config
    return {
        "BLOCK_K": c.BLOCK_K,
        "BLOCK_D": c.BLOCK_D,
        "CHUNKS": c.CHUNKS,
        "EVEN": c.even(v.d),
    }
