"""The monarch family's Triton kernels: in the interpreter with tiny sizes, and as compiled."""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from kexue_kernels.monarch import (
    plan,
    triton_block_diag_matmul,
    triton_monarch_matmul,
    triton_monarch_products,
)
from kexue_kernels.monarch.plan import Tile
from kexue_kernels.monarch.triton_monarch_cases import compile_cases
from kexue_kernels.offline import pool
from kexue_kernels.offline import triton as offline
from kexue_kernels.offline.archs import ARCHS
from kexue_kernels.offline.instructions import _hottest_body
from kexue_kernels.triton_common import precision
from tests.monarch.cases import DTYPES, Blocks, Case, check_close, make, run, widened

BF16, FP16, F32, C64 = torch.bfloat16, torch.float16, torch.float32, torch.complex64
SQUARE = Case(k=16, q=16, p=16, l=16, s=16, N=20, dtype=BF16)  # what the fused kernel serves
EVERY = [
    *(Case(dtype=dtype) for dtype in DTYPES),  # l doesn't divide q
    *(Case(dtype=dtype, strided=True) for dtype in (BF16, C64)),
    Case(k=2, q=10, p=17, l=5, s=18, N=70, dtype=FP16, bias=False),  # beyond one tile each way
    Case(k=2, q=5, p=3, l=10, s=2, N=33),  # q smaller than l
    Case(k=5, q=2, p=1, l=1, s=3, N=1, dtype=BF16),
    Case(k=1, q=6, p=4, l=3, s=1, N=2),
    SQUARE,
    replace(SQUARE, dtype=FP16, p=32, bias=False),
    *(Blocks(dtype=dtype) for dtype in DTYPES),
    Blocks(k=2, q=48, p=64, N=70, dtype=FP16),
    Blocks(k=2, q=18, p=17, N=70, dtype=BF16, strided=True, bias=False),
]


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_values_and_gradients(case: Case, poisoned: None) -> None:
    inputs, grad = make(case)
    exact = run(case, {n: widened(x) for n, x in inputs.items()}, widened(grad), "reference")
    own = run(case, inputs, grad, "reference")
    for name, found in run(case, inputs, grad, "triton").items():
        assert found.is_contiguous(), name
        check_close(name, found, own[name], exact[name])


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were launched, by name."""
    names: list[str] = []

    def record(module: object, name: str) -> None:
        kernel = getattr(module, name)

        class Recorder:
            def __getitem__(self, grid: tuple[int, ...]) -> object:
                names.append(name.removesuffix("_kernel"))
                return kernel[grid]

        monkeypatch.setattr(module, name, Recorder())

    for what in ("product", "weights"):
        record(triton_monarch_products, f"block_{what}_kernel")
        record(triton_monarch_products, f"adjacent_{what}_kernel")
    record(triton_monarch_products, "block_gradients_kernel")
    record(triton_monarch_products, "resident_product_kernel")
    record(triton_monarch_matmul, "fused_kernel")
    record(triton_monarch_matmul, "resident_fused_kernel")
    return names


@pytest.fixture
def resident(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors stay on chip where they fit, as in many rows on a GPU with shared memory for them."""

    def chosen(shape: plan.Shape, shared: int, vectors: bool) -> plan.Plan:
        found = [p for p in plan.costs(shape, plan.RESIDENT_SHARED) if p.resident]
        return min(found if vectors else found[:1], key=lambda each: each.seconds)

    monkeypatch.setattr(triton_monarch_matmul, "plan", chosen)
    monkeypatch.setattr(triton_monarch_products, "PANEL", 32)


def test_one_kernel_where_everything_fits(launched: list[str]) -> None:
    inputs, grad = make(SQUARE)
    triton_monarch_matmul.forward(**inputs)
    assert launched == ["fused"]
    del inputs["bias"]
    triton_monarch_matmul.backward(grad, **inputs, wanted=(True, False, False))
    assert launched == ["fused", "fused"]


def test_two_kernels_elsewhere_and_no_copy(launched: list[str]) -> None:
    case = Case(k=2, q=8, l=8, N=3, dtype=BF16)
    inputs, grad = make(case)
    triton_monarch_matmul.forward(**inputs)
    assert launched == ["block_product", "adjacent_product"]
    launched.clear()
    del inputs["bias"]
    triton_monarch_matmul.backward(grad, **inputs, wanted=(True, True, True))
    second = ["block_product", "adjacent_weights"]  # z again, and w2's gradient
    assert launched == [*second, "adjacent_product", "block_gradients"]


ONE = ["resident_fused"]
TWO = ["block_product", "resident_product"]
KEPT = [
    (Case(k=32, q=32, p=16, l=32, s=32, N=37, dtype=BF16), ONE),  # three tiles of rows
    (Case(k=32, q=48, p=32, l=48, s=16, N=150, dtype=FP16), ONE),  # two groups, 5 tiles each
    (Case(k=16, q=48, p=16, l=16, s=80, N=40, dtype=BF16), TWO),  # two tiles of outputs
    (Case(k=16, q=80, p=16, l=16, s=48, N=35, dtype=FP16), TWO),  # by 32 outputs
    (Case(k=16, q=96, p=16, l=32, s=16, N=20, dtype=BF16, bias=False, strided=True), TWO),
]


@pytest.mark.parametrize(("case", "kernels"), KEPT, ids=str)
def test_factors_that_stay_on_chip(
    case: Case, kernels: list[str], resident: None, launched: list[str], poisoned: None
) -> None:
    inputs, grad = make(case)
    exact = run(case, {n: widened(x) for n, x in inputs.items()}, widened(grad), "reference")
    own = run(case, inputs, grad, "reference")
    y = triton_monarch_matmul.forward(**({"bias": None} | inputs))
    assert launched == kernels
    check_close("y", y, own["y"], exact["y"])


@pytest.mark.parametrize("place", range(3))
def test_only_what_is_wanted(place: int) -> None:
    inputs, grad = make(Case(bias=False))
    wanted = (place == 0, place == 1, place == 2)
    every = triton_monarch_matmul.backward(grad, **inputs, wanted=(True, True, True))
    found = triton_monarch_matmul.backward(grad, **inputs, wanted=wanted)
    assert [x is not None for x in found] == list(wanted)
    assert torch.equal(found[place], every[place])  # type: ignore[arg-type]


def test_the_gradient_of_x_by_the_fused_kernel() -> None:
    case = replace(SQUARE, bias=False)
    inputs, grad = make(case)
    exact = run(case, {n: widened(x) for n, x in inputs.items()}, widened(grad), "reference")
    own = run(case, inputs, grad, "reference")
    dx, *others = triton_monarch_matmul.backward(grad, **inputs, wanted=(True, False, False))
    assert dx is not None
    assert others == [None, None]
    check_close("grad x", dx, own["grad x"], exact["grad x"])


def test_any_split_of_the_rows_is_a_sum_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits again, from one partial sum as from three."""
    g, x = torch.randint(-8, 8, (2, 70, 3, 4)).float()
    for rows in (32, 64, 128):
        monkeypatch.setattr(triton_monarch_products, "ROWS_INTERPRETED", rows)
        found = triton_monarch_products.weights_gradient(g, x)
        assert torch.equal(found, torch.einsum("mco,mci->coi", g, x))


def test_a_tile_of_the_rule_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU is given it, with most of it outside the tensors."""
    monkeypatch.setattr(
        triton_monarch_products, "interpreted_tile", lambda beside: Tile(64, 32, 32, 16, 16, 1)
        if beside > 1 else Tile(128, 32, 32, 1, 4, 2)
    )  # fmt: skip
    case = Case(k=2, q=17, p=3, l=17, s=2, N=3)
    inputs, grad = make(case)
    exact = run(case, {n: widened(x) for n, x in inputs.items()}, widened(grad), "reference")
    own = run(case, inputs, grad, "reference")
    for name, found in run(case, inputs, grad, "triton").items():
        check_close(name, found, own[name], exact[name])


def test_which_blocks_lie_side_by_side() -> None:
    adjacent = triton_monarch_products.adjacent
    rows = torch.zeros(5, 24)
    assert adjacent(rows.unflatten(1, (4, 6))) == 1
    assert adjacent(rows.unflatten(1, (4, 6)).mT) == 6
    assert adjacent(rows.unflatten(1, (24, 1)).mT) == 1
    assert adjacent(rows.unflatten(1, (1, 24)).mT) == 24
    assert adjacent(rows.T[:, :4].unflatten(1, (2, 2))) == 1


def test_offsets_of_64_bits_where_a_tile_reaches_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_monarch_products.dispatch, "interpreting", lambda: False)
    near = torch.empty(1, device="meta").as_strided((128, 2, 64), (2**16, 64, 1))
    far = near.as_strided((128, 2, 64), (1, 64 * 2**30, 2**30))
    complex_ = near.to(C64).as_strided((128, 2, 64), (2**23, 64, 1))
    assert not triton_monarch_products.wide([(near, (128, 1, 64))])
    assert triton_monarch_products.wide([(near, (128, 1, 64)), (far, (128, 1, 64))])
    assert triton_monarch_products.wide([(complex_, (128, 1, 64))])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"fp32_precision": "none"}, "ieee"),
        ({"fp32_precision": "ieee"}, "ieee"),
        ({"fp32_precision": "tf32"}, "tf32"),
        ({"allow_tf32": False}, "ieee"),  # before PyTorch 2.9
        ({"allow_tf32": True}, "tf32"),
    ],
    ids=str,
)
def test_tf32_only_where_pytorch_allows_it(
    settings: dict[str, object], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(**settings))
    assert [precision(dtype) for dtype in (F32, C64)] == [expected, expected]
    assert [precision(dtype) for dtype in (BF16, FP16)] == ["ieee", "ieee"]


def test_block_diag_gradients_on_their_own() -> None:
    inputs, grad = make(Blocks(bias=False))
    every = triton_block_diag_matmul.backward(grad, **inputs, wanted=(True, True))
    for place in range(2):
        wanted = (place == 0, place == 1)
        found = triton_block_diag_matmul.backward(grad, **inputs, wanted=wanted)
        assert [x is not None for x in found] == list(wanted)
        assert torch.equal(found[place], every[place])  # type: ignore[arg-type]


# ---- as compiled

MULTIPLIED_BY = {  # on sm_90
    "bfloat16-block-product-128x64x64x1": "HGMMA",
    "bfloat16-block-weights-64x64x64x1": "HGMMA",
    "bfloat16-block-weights-64x128x128x1": "HGMMA",
    "bfloat16-block-gradients-64x64x64x1": "HGMMA",
    "bfloat16-adjacent-weights-16x64x32x16": "HMMA",
    "bfloat16-panel-product-128x64x64x1": "HGMMA",
    "bfloat16-panel-product-256x128x64x1": "HGMMA",
    "bfloat16-adjacent-product-64x32x32x16": "HMMA",
    "bfloat16-fused-64x32x32x16": "HMMA",
    "bfloat16-resident-product-16x64x64x16": "HMMA",
    "bfloat16-resident-product-16x32x128x16": "HMMA",
    "bfloat16-resident-fused-16x32x32x32": "HMMA",
}


class Compiled(NamedTuple):
    shared: int
    problems: list[str]
    tensor_opcodes: list[str]
    widths: dict[str, set[int]]  # of accesses in the hottest loop, by opcode


def test_every_rule_has_its_case() -> None:
    """What the launchers can choose is what is compiled."""
    tiles = {tuple(map(int, c.name.rsplit("-", 1)[1].split("x"))) for c in compile_cases()}
    for dtype in DTYPES:
        for O in (1, 32, 33, 64, 65, 1000):
            for beside in (1, 2, 4, 5, 64):
                for whole in (False, True):
                    assert plan.product_tile(dtype, O, beside, whole)[:4] in tiles
                for I, shared in ((8, 0), (65, plan.WIDE_SHARED)):
                    assert plan.weights_tile(dtype, O, I, beside, shared)[:4] in tiles
    for O in (16, 33, 64, 65, 128):
        assert plan.gradients_tile(BF16, O, 8, plan.RESIDENT_SHARED)[:4] in tiles  # type: ignore[index]
        assert plan.panel_tile(O)[:4] in tiles
        assert plan.resident_tile(O)[:4] in tiles
    names = [case.name for case in compile_cases()]
    assert len(set(names)) == len(names)


@pytest.fixture(scope="module")
def compiled() -> dict[str, Compiled]:
    jobs: list[Any] = [(compile_case, (name,)) for name in MULTIPLIED_BY]
    return dict(zip(MULTIPLIED_BY, pool.run(jobs), strict=True))  # type: ignore[arg-type]


def test_tensor_cores_multiply(compiled: dict[str, Compiled]) -> None:
    found = {name: each.tensor_opcodes for name, each in compiled.items()}
    assert found == {name: [opcode] for name, opcode in MULTIPLIED_BY.items()}


def test_shared_memory_is_what_rules_ask_for(compiled: dict[str, Compiled]) -> None:
    kept = {case.name for case in compile_cases() if case.archs == ("sm_90", "sm_100")}
    wide = {case.name for case in compile_cases() if case.archs == ("sm_80", "sm_90", "sm_100")}
    assert kept & set(compiled) == {name for name in MULTIPLIED_BY if "-resident-" in name}
    for name, each in compiled.items():
        assert each.problems == [], name
        limit = plan.WIDE_SHARED if name in wide else 99 * 1024
        assert each.shared <= (plan.RESIDENT_SHARED if name in kept else limit), name


def test_rows_pass_in_whole_vectors(compiled: dict[str, Compiled]) -> None:
    """Past factors that stay: from memory in copies that need no registers, 16 bytes a lane."""
    for name, each in compiled.items():
        if "-resident-" in name:
            widths = each.widths
            assert widths["LDGSTS"] == widths["STG"] == widths["LDSM"] == {16}, name


def compile_case(name: str) -> Compiled:
    """On sm_90. For a process where Triton does not interpret."""
    found = compile_cases()
    (place,) = (n for n, case in enumerate(found) if case.name == name)
    (card,) = offline.cards("monarch", "kexue_kernels.monarch.triton_monarch_cases", place, "sm_90")
    needs = offline._read_nvidia(offline._compile(found[place], ARCHS["sm_90"]))
    tensor = {i.opcode.split(".")[0] for i in needs.code if i.kind == "tensor"}
    widths = defaultdict(set)
    for instruction in _hottest_body(needs.code):
        widths[instruction.opcode.split(".")[0]].add(instruction.bytes)
    assert card.shared is not None
    return Compiled(card.shared, card.problems, sorted(tensor), dict(widths))
