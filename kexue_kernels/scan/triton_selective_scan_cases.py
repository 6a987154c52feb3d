"""Configurations of selective_scan's Triton kernels, one for each way they can be compiled."""

from dataclasses import dataclass

import torch

from kexue_kernels.offline import TritonCase
from kexue_kernels.scan.chunks import chunk_length
from kexue_kernels.scan.triton_selective_scan import (
    JOIN_RUN,
    JOIN_WARPS,
    NUM_STAGES,
    configure,
    configure_tile,
    run_of,
)

_MODULE = "kexue_kernels.scan.triton_selective_"
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_SIZES = ("L", "d", "n", "groups", "splits", "split_length")
_ALIGNED = ("_batch", "_step", "_channel")
_H200 = 132  # multiprocessors
_D = 2048


@dataclass(frozen=True)
class _Variant:
    dtype: torch.dtype = torch.bfloat16
    n: int = 16
    complex: bool = False
    invariant: str = ""  # "B", "C" or both
    options: bool = True  # D, z, delta_bias, delta_softplus, initial_state, final_state
    checkpoints: bool = True
    packed: bool = False
    splits: bool = False
    strided: bool = False  # [batch, d, L]

    @property
    def parts(self) -> int:
        return 2 if self.complex else 1

    def __str__(self) -> str:
        flags = {"complex": self.complex, "plain": not self.options}
        flags |= {f"invariant{self.invariant}": bool(self.invariant)}
        flags |= {"inference": not self.checkpoints, "packed": self.packed}
        flags |= {"split": self.splits, "strided": self.strided}
        return "-".join(
            [
                str(self.dtype).removeprefix("torch."),
                f"n{self.n}",
                *(name for name, on in flags.items() if on),
            ]
        )


_COMMON = [
    _Variant(),
    _Variant(torch.float32),
    _Variant(torch.float16, options=False),
    _Variant(torch.float32, complex=True),
    _Variant(packed=True, splits=True),
    _Variant(torch.float32, invariant="BC", strided=True),
    _Variant(n=256),
]
_FORWARD = [*_COMMON, _Variant(splits=True, checkpoints=False)]
_BACKWARD = [*_COMMON, _Variant(torch.float32, complex=True, packed=True)]
_SPLITS = [(_Variant(), False), (_Variant(), True), (_Variant(torch.float32, complex=True), True)]


def compile_cases() -> list[TritonCase]:
    return [
        *(_forward(v) for v in _FORWARD),
        *(_backward(v) for v in _BACKWARD),
        *(_split(v, reverse) for v, reverse in _SPLITS),
        _join(_Variant(complex=True)),
    ]


def _forward(v: _Variant) -> TritonCase:
    data, state, given = _data(v), "*fp32", v.options
    config = configure(8, 2048, _D, v.n, v.parts, 1, _H200)
    arguments = {
        "u_ptr": data,
        "delta_ptr": data,
        **_matrices(),
        "D_ptr": state if given else None,
        "z_ptr": data if given else None,
        "bias_ptr": state if given else None,
        "initial_ptr": state if given else None,
        "leaving_ptr": state if v.splits else None,
        "borders_ptr": "*i32" if v.packed else None,
        "out_ptr": data,
        "final_ptr": state if given else None,
        "checkpoints_ptr": state if v.checkpoints else None,
        **_sizes("one"),
        **_strides(v, "u", "delta", "z" if given else ""),
        "SOFTPLUS": given,
        **_constants(v),
        "CHUNK": chunk_length(v.n),
        "RUN": run_of(config, v.checkpoints),
        "N": config.N,
        "BLOCK_D": config.BLOCK_D,
    }
    return _case("forward", v, "scan_kernel:selective_scan_kernel", arguments, config.num_warps)


def _backward(v: _Variant) -> TritonCase:
    data, state, given = _data(v), "*fp32", v.options
    config = configure(8, 2048, _D, v.n, v.parts, 1, _H200)
    tile = configure_tile(2048, v.n, v.parts, v.packed)
    borders = state if v.packed else None
    arguments = {
        "grad_out_ptr": data,
        "u_ptr": data,
        "delta_ptr": data,
        **_matrices(),
        "D_ptr": state if given else None,
        "z_ptr": data if given else None,
        "bias_ptr": state if given else None,
        "initial_ptr": borders,
        "grad_final_ptr": borders,
        "borders_ptr": "*i32" if v.packed else None,
        "checkpoints_ptr": state,
        "K_ptr": state,
        "grad_u_ptr": data,
        "grad_delta_ptr": data,
        "grad_A_ptr": state,
        "grad_B_ptr": state,
        "grad_C_ptr": state,
        "grad_D_ptr": state if given else None,
        "grad_z_ptr": data if given else None,
        "grad_bias_ptr": state if given else None,
        "grad_initial_ptr": borders,
        **_sizes(),
        **_strides(v, "grad_out", "u", "delta", "z" if given else ""),
        "SOFTPLUS": given,
        **_constants(v),
        "CHUNK": chunk_length(v.n),
        "RUN": tile.RUN,
        "RUNS": tile.RUNS,
        "N": config.N,
        "BLOCK_D": tile.BLOCK_D,
        "VECTOR": 4,
    }
    kernel = "scan_backward_kernel:selective_scan_backward_kernel"
    return _case("backward", v, kernel, arguments, tile.num_warps)


def _split(v: _Variant, reverse: bool) -> TritonCase:
    data, state = _data(v), "*fp32"
    config = configure(1, 65536, 256, v.n, v.parts, 1, _H200)
    arguments = {
        "value_ptr": data,
        "delta_ptr": data,
        "A_ptr": state,
        "M_ptr": state,
        "z_ptr": data if reverse else None,
        "bias_ptr": state,
        "first_ptr": state,
        "borders_ptr": "*i32" if v.packed else None,
        "cu_seqlens_ptr": "*i64" if v.packed else None,
        "local_ptr": state,
        "total_ptr": state,
        **_sizes("one"),
        **_strides(v, "value", "delta", "z" if reverse else ""),
        "SOFTPLUS": True,
        "COMPLEX": v.complex,
        "INVARIANT": False,
        "REVERSE": reverse,
        "RUN": config.RUN,
        "N": config.N,
        "BLOCK_D": config.BLOCK_D,
    }
    name = "split-backward" if reverse else "split-forward"
    return _case(name, v, "splits_kernel:split_kernel", arguments, config.num_warps)


def _join(v: _Variant) -> TritonCase:
    state = "*fp32"
    arguments = {"A_ptr": state, "state_ptr": state, "total_ptr": state}
    arguments |= dict.fromkeys(("d", "n", "splits"), "i32")
    constants = {"COMPLEX": v.complex, "REVERSE": True, "RUN": JOIN_RUN, "BLOCK": 32 * JOIN_WARPS}
    return _case("join", v, "splits_kernel:join_kernel", {**arguments, **constants}, JOIN_WARPS)


def _data(v: _Variant) -> str:
    return f"*{_NAMES[v.dtype]}"


def _matrices() -> dict[str, object]:
    return {f"{name}_ptr": "*fp32" for name in "ABC"}


def _sizes(*more: str) -> dict[str, object]:
    return dict.fromkeys((*_SIZES, *more), "i32")


def _strides(v: _Variant, *names: str) -> dict[str, object]:
    """Triton takes an argument that is 1 for a constant."""
    step, channel = (1, "i32") if v.strided else ("i32", 1)
    found: dict[str, object] = {}
    for name in names:
        own = ("i32", step, channel) if name else (0, 0, 0)
        kinds = zip(("batch", "step", "channel"), own, strict=True)
        found |= {f"{name or 'z'}_{axis}": kind for axis, kind in kinds}
    return found


def _constants(v: _Variant) -> dict[str, object]:
    return {
        "COMPLEX": v.complex,
        "B_INVARIANT": "B" in v.invariant,
        "C_INVARIANT": "C" in v.invariant,
    }


def _case(
    kind: str, v: _Variant, kernel: str, arguments: dict[str, object], num_warps: int
) -> TritonCase:
    """Per element (b, l, d): its data once each way, and 8 operations for each of n states."""
    types = {k: t for k, t in arguments.items() if isinstance(t, str)}
    arrays = {"forward": 4, "backward": 7}.get(kind, 2)
    return TritonCase(
        op="selective_scan",
        name=f"{kind}-{v}",
        kernel=_MODULE + kernel,
        signature={k: types.get(k, "constexpr") for k in arguments},
        constexprs={k: value for k, value in arguments.items() if k not in types},
        num_warps=num_warps,
        num_stages=NUM_STAGES,
        bytes_per_element=arrays * v.dtype.itemsize,
        flops_per_element={"forward": 8, "backward": 24}.get(kind, 6) * v.n * v.parts,
        divisible_by_16=tuple(
            k for k, t in types.items() if t[0] == "*" or k == "d" or k.endswith(_ALIGNED)
        ),
    )
