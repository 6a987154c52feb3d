"""Every configuration of the monarch family's Triton kernels that the launchers can choose."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kexue_kernels.monarch.plan import FUSED, HALVES, Tile, product_tile, weights_tile
from kexue_kernels.offline import TritonCase

_MODULE = "kexue_kernels.monarch.triton_monarch_"
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.complex64)


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
        *(_fused(dtype, transposed) for dtype in HALVES for transposed in (False, True)),
    ]


def _products() -> Iterator[_Variant]:
    bf16 = torch.bfloat16
    for O in (32, 64, 128):
        yield _Variant(bf16, O)
    for adjacent in (False, True):
        yield _Variant(bf16, adjacent=adjacent, transposed=True)
        yield _Variant(torch.float16, adjacent=adjacent)
        yield _Variant(bf16, O=63, adjacent=adjacent, whole=False)
        yield from _wide(adjacent)
    for C in (4, 64):
        yield _Variant(bf16, C=C, adjacent=True)


def _gradients() -> Iterator[_Variant]:
    for dtype in HALVES:
        yield _Variant(dtype, 32)
        yield _Variant(dtype, 64)
        yield _Variant(dtype, adjacent=True)
        yield _Variant(dtype, C=4, adjacent=True)
    for adjacent in (False, True):
        yield from _wide(adjacent)


def _wide(adjacent: bool) -> Iterator[_Variant]:
    for dtype in (torch.float32, torch.complex64):
        for precision in ("ieee", "tf32"):
            yield _Variant(dtype, adjacent=adjacent, precision=precision)


def _product(variant: _Variant) -> TritonCase:
    v = variant
    tile = product_tile(v.dtype, v.O, v.beside, v.whole)
    last = "c" if v.adjacent else None
    arguments = {
        **dict.fromkeys(("x_ptr", "w_ptr", "bias_ptr", "y_ptr"), _pointer(v.dtype)),
        **dict.fromkeys(("rows", "blocks", "O"), "i32"),
        **_strides(v.dtype, "x", "mci", last or "i"),
        **_strides(v.dtype, "w", "coi", "o" if v.transposed else "i"),
        **_strides(v.dtype, "bias", "co", last or "o"),
        **_strides(v.dtype, "y", "mco", last or "o"),
        "I": v.O,
        "COMPLEX": v.dtype.is_complex,
        "CONJUGATE": v.transposed,
        "PRECISION": v.precision,
        "WIDE": False,
        **_blocks(tile, v.adjacent),
    }
    what = "adjacent" if v.adjacent else "block"
    kernel = f"{_MODULE}product_kernel:{what}_product_kernel"
    size = v.dtype.itemsize
    return _case(v, f"{what}-product", tile, kernel, arguments, 2 * size, 2 * v.O)


def _weights(variant: _Variant) -> TritonCase:
    v = variant
    tile = weights_tile(v.dtype, v.O, v.O, v.beside)
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


def _fused(dtype: torch.dtype, transposed: bool) -> TritonCase:
    """32 blocks of 32 x 32."""
    v = _Variant(dtype, 32, 32, transposed=transposed)
    x, u, w, y = ("a", "c", "o", "o") if transposed else ("i", "i", "a", "c")
    arguments = {
        **dict.fromkeys(("x_ptr", "u_ptr", "v_ptr", "bias_ptr", "y_ptr"), _pointer(dtype)),
        "rows": "i32",
        "outer": "i32",
        **_strides(dtype, "x", "mai", x),
        **_strides(dtype, "u", "aci", u),
        **_strides(dtype, "v", "coa", w),
        "bias_c": 1,
        "bias_o": "i32",
        **_strides(dtype, "y", "mco", y),
        **dict.fromkeys("AIO", 32),
        "STORE_C_LAST": not transposed,
        "WIDE": False,
        **{k: n for k, n in FUSED._asdict().items() if k.startswith("BLOCK")},
    }
    if transposed:
        arguments |= {"bias_ptr": None, "bias_c": 0, "bias_o": 0}
    tile = Tile(FUSED.BLOCK_M, FUSED.BLOCK_O, FUSED.BLOCK_I, FUSED.BLOCK_C, *FUSED[-2:])
    kernel = f"{_MODULE}fused_kernel:fused_kernel"
    return _case(v, "fused", tile, kernel, arguments, 2 * dtype.itemsize, 4 * 32)


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
