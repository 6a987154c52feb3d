"""Every configuration of the monarch family's Triton kernels that the launchers can choose."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kexue_kernels.monarch.plan import (
    FUSED,
    HALVES,
    PANEL,
    RESIDENT_FUSED,
    RESIDENT_SHARED,
    WIDE_SHARED,
    FusedTile,
    Tile,
    gradients_tile,
    panel_tile,
    product_tile,
    resident_tile,
    weights_tile,
)
from kexue_kernels.offline import TritonCase
from kexue_kernels.offline.archs import ARCHS

_MODULE = "kexue_kernels.monarch.triton_monarch_"
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class _Variant:
    """C blocks, O x I each; `adjacent`: side by side in memory."""

    dtype: torch.dtype
    O: int = 64
    C: int = 64
    adjacent: bool = False
    transposed: bool = False
    precision: str = "ieee"
    whole: bool = True
    panel: bool = False
    shared: int = 0  # bytes that a device must have

    def name(self, what: str, tile: Tile) -> str:
        parts = [str(self.dtype).removeprefix("torch."), what]
        parts += ["transposed"] * self.transposed + ["tf32"] * (self.precision == "tf32")
        parts += ["ragged"] * (not self.whole)
        return "-".join([*parts, "x".join(str(n) for n in tile[:4])])

    @property
    def beside(self) -> int:
        return self.C if self.adjacent else 1


def compile_cases() -> list[TritonCase]:
    return [
        *(_product(variant) for variant in _products()),
        *(_weights(variant) for variant in _gradients()),
        *(_both(_Variant(torch.bfloat16, O)) for O in (32, 64)),
        _both(_Variant(torch.bfloat16, 128, shared=RESIDENT_SHARED)),
        *(_resident_product(variant) for variant in _kept()),
        *(_fused(dtype, transposed) for dtype in HALVES for transposed in (False, True)),
        *(_resident_fused(dtype) for dtype in HALVES),
    ]


def _products() -> Iterator[_Variant]:
    bf16 = torch.bfloat16
    for O in (32, 64, 128):
        yield _Variant(bf16, O)
        yield _Variant(bf16, O, panel=True)
    for adjacent in (False, True):
        yield _Variant(bf16, adjacent=adjacent, transposed=True)
        yield _Variant(torch.float16, adjacent=adjacent)
        yield _Variant(bf16, O=63, adjacent=adjacent, whole=False)
        yield from _wide(adjacent)
    for C in (4, 64):
        yield _Variant(bf16, C=C, adjacent=True)


def _kept() -> Iterator[_Variant]:
    for I in (64, 128):
        yield _Variant(torch.bfloat16, I, adjacent=True, shared=RESIDENT_SHARED)


def _gradients() -> Iterator[_Variant]:
    for dtype in HALVES:
        yield _Variant(dtype, 32)
        yield _Variant(dtype, 64)
        yield _Variant(dtype, adjacent=True)
        yield _Variant(dtype, C=4, adjacent=True)
    yield _Variant(torch.bfloat16, 128)
    yield _Variant(torch.bfloat16, adjacent=True, shared=WIDE_SHARED)
    for adjacent in (False, True):
        yield from _wide(adjacent)


def _wide(adjacent: bool) -> Iterator[_Variant]:
    for dtype in (torch.float32, torch.complex64):
        for precision in ("ieee", "tf32"):
            yield _Variant(dtype, adjacent=adjacent, precision=precision)


def _product(variant: _Variant) -> TritonCase:
    v = variant
    tile = panel_tile(v.O) if v.panel else product_tile(v.dtype, v.O, v.beside, v.whole)
    last = "c" if v.adjacent else None
    arguments = {
        **dict.fromkeys(("x_ptr", "w_ptr", "bias_ptr", "y_ptr"), _pointer(v.dtype)),
        **dict.fromkeys(("rows", "blocks", "O"), "i32"),
        **_strides(v.dtype, "x", "mci", last or "i"),
        **_strides(v.dtype, "w", "coi", "o" if v.transposed else "i"),
        **_strides(v.dtype, "bias", "co", last or "o"),
        **_strides(v.dtype, "y", "mco", "" if v.panel else last or "o"),
        "I": v.O,
        "COMPLEX": v.dtype.is_complex,
        "CONJUGATE": v.transposed,
        "PRECISION": v.precision,
        "WIDE": False,
        **({} if v.adjacent else {"PANEL": PANEL if v.panel else 0}),
        **_blocks(tile, v.adjacent),
    }
    if v.panel:
        arguments |= {"bias_ptr": None, "bias_c": 0, "bias_o": 0}
    what = "panel" if v.panel else "adjacent" if v.adjacent else "block"
    kernel = f"{_MODULE}product_kernel:{'adjacent' if v.adjacent else 'block'}_product_kernel"
    size = v.dtype.itemsize
    return _case(v, f"{what}-product", tile, kernel, arguments, 2 * size, 2 * v.O)


def _resident_product(variant: _Variant) -> TritonCase:
    v, tile = variant, resident_tile(variant.O)
    arguments = {
        **dict.fromkeys(("x_ptr", "w_ptr", "bias_ptr", "y_ptr"), _pointer(v.dtype)),
        **dict.fromkeys(("rows", "blocks", "O", "x_panel", "x_c", "x_i"), "i32"),
        **_strides(v.dtype, "w", "coi", "i"),
        **_strides(v.dtype, "bias", "co", "c"),
        **_strides(v.dtype, "y", "mco", "c"),
        "I": v.O,
        "PANEL": PANEL,
        "WIDE": False,
        **_blocks(tile, True),
    }
    kernel = f"{_MODULE}product_kernel:resident_product_kernel"
    size = v.dtype.itemsize
    return _case(v, "resident-product", tile, kernel, arguments, 2 * size, 2 * v.O)


def _weights(variant: _Variant) -> TritonCase:
    v = variant
    tile = weights_tile(v.dtype, v.O, v.O, v.beside, v.shared)
    last = "c" if v.adjacent else None
    real = v.dtype.is_complex or v.dtype == torch.float32
    arguments = {
        **dict.fromkeys(("g_ptr", "x_ptr"), _pointer(v.dtype)),
        "dw_ptr": "*fp32",
        **dict.fromkeys(("rows", "blocks", "O", "I"), "i32"),
        **_strides(v.dtype, "g", "mco", last or "o"),
        **_strides(v.dtype, "x", "mci", last or "i"),
        "dw_split": "i32",
        **_strides(v.dtype if real else torch.float32, "dw", "coi", "i"),
        "SPLIT": 4096,
        "COMPLEX": v.dtype.is_complex,
        "PRECISION": v.precision,
        "WIDE": False,
        **_blocks(tile, v.adjacent),
    }
    what = "adjacent" if v.adjacent else "block"
    kernel = f"{_MODULE}weights_kernel:{what}_weights_kernel"
    size = v.dtype.itemsize
    return _case(v, f"{what}-weights", tile, kernel, arguments, 2 * size, 2 * v.O)


def _both(variant: _Variant) -> TritonCase:
    v, tile = variant, gradients_tile(variant.dtype, variant.O, variant.O, variant.shared)
    assert tile is not None
    arguments = {
        **dict.fromkeys(("g_ptr", "w_ptr", "x_ptr", "dx_ptr"), _pointer(v.dtype)),
        "dw_ptr": "*fp32",
        **dict.fromkeys(("rows", "blocks"), "i32"),
        **_strides(v.dtype, "g", "mco", "o"),
        **_strides(v.dtype, "w", "coi", "i"),
        **_strides(v.dtype, "x", "mci", "i"),
        **_strides(v.dtype, "dx", "mci", "i"),
        "dw_split": "i32",
        **_strides(torch.float32, "dw", "coi", "i"),
        **dict.fromkeys("OI", v.O),
        "SPLIT": 4096,
        "WIDE": False,
        **_blocks(tile, False),
    }
    kernel = f"{_MODULE}weights_kernel:block_gradients_kernel"
    size = v.dtype.itemsize
    return _case(v, "block-gradients", tile, kernel, arguments, 3 * size, 4 * v.O)


def _fused(dtype: torch.dtype, transposed: bool) -> TritonCase:
    """32 blocks of 32 x 32."""
    v = _Variant(dtype, 32, 32, transposed=transposed)
    x, y = ("a", "o") if transposed else ("i", "c")
    arguments = _fused_arguments(dtype, FUSED, x, "c" if transposed else "i", y)
    arguments["STORE_C_LAST"] = not transposed
    if transposed:
        arguments |= {"bias_ptr": None, "bias_c": 0, "bias_o": 0}
    kernel = f"{_MODULE}fused_kernel:fused_kernel"
    return _case(v, "fused", _tile(FUSED), kernel, arguments, 2 * dtype.itemsize, 4 * 32)


def _resident_fused(dtype: torch.dtype) -> TritonCase:
    """32 blocks of 32 x 32."""
    v, tile = _Variant(dtype, 32, 32, shared=RESIDENT_SHARED), RESIDENT_FUSED
    arguments = _fused_arguments(dtype, tile, "i", "i", "c")
    kernel = f"{_MODULE}fused_kernel:resident_fused_kernel"
    costs = 2 * dtype.itemsize, 4 * 32
    return _case(v, "resident-fused", _tile(tile), kernel, arguments, *costs)


def _fused_arguments(
    dtype: torch.dtype, tile: FusedTile, x: str, u: str, y: str
) -> dict[str, object]:
    """x, u, y: the fastest axes."""
    return {
        **dict.fromkeys(("x_ptr", "u_ptr", "v_ptr", "bias_ptr", "y_ptr"), _pointer(dtype)),
        "rows": "i32",
        "outer": "i32",
        **_strides(dtype, "x", "mai", x),
        **_strides(dtype, "u", "aci", u),
        **_strides(dtype, "v", "coa", "a" if u == "i" else "o"),
        "bias_c": 1,
        "bias_o": "i32",
        **_strides(dtype, "y", "mco", y),
        **dict.fromkeys("AIO", 32),
        "WIDE": False,
        **{k: n for k, n in tile._asdict().items() if k.startswith("BLOCK")},
    }


def _tile(tile: FusedTile) -> Tile:
    return Tile(tile.BLOCK_M, tile.BLOCK_O, tile.BLOCK_I, tile.BLOCK_C, *tile[-2:])


def _case(
    variant: _Variant,
    what: str,
    tile: Tile,
    kernel: str,
    arguments: dict[str, object],
    bytes_per_element: float,
    flops_per_element: float,
) -> TritonCase:
    types = {k: v for k, v in arguments.items() if isinstance(v, str) and k != "PRECISION"}
    parts = 4 if variant.dtype.is_complex else 1
    able = [arch.name for arch in ARCHS.values() if arch.shared_per_block >= variant.shared]
    return TritonCase(
        op="monarch_matmul",
        name=variant.name(what, tile),
        kernel=kernel,
        signature={k: types.get(k, "constexpr") for k in arguments},
        constexprs={k: v for k, v in arguments.items() if k not in types},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        bytes_per_element=bytes_per_element,
        flops_per_element=parts * flops_per_element,
        divisible_by_16=tuple(
            k for k, v in types.items() if v[0] == "*" or (k != "rows" and variant.whole)
        ),
        archs=tuple(able),
    )


def _pointer(dtype: torch.dtype) -> str:
    return f"*{_NAMES.get(dtype, 'fp32')}"


def _strides(dtype: torch.dtype, name: str, axes: str, last: str) -> dict[str, object]:
    """In real numbers; that of the last axis in memory is constant where it is 1."""
    if dtype.is_complex:
        return {f"{name}_{axis}": "i32" for axis in axes}
    return {f"{name}_{axis}": 1 if axis == last else "i32" for axis in axes}


def _blocks(tile: Tile, adjacent: bool) -> dict[str, object]:
    found: dict[str, object] = {"BLOCK_M": tile.BLOCK_M, "BLOCK_O": tile.BLOCK_O}
    return found | {"BLOCK_I": tile.BLOCK_I} | ({"BLOCK_C": tile.BLOCK_C} if adjacent else {})
