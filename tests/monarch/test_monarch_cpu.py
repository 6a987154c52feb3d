"""Products with block-diagonal matrices in C++: instruction sets, threads, tiles, strides."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import cpu
from tests.monarch.cases import (
    BLOCKS,
    CASES,
    DTYPES,
    Blocks,
    Case,
    check,
    check_close,
    legal_cases,
    make,
    run,
    spread,
    widened,
)

cpu.extension()

from kexue_kernels.monarch import cpu_block_diag_matmul, cpu_monarch_matmul  # noqa: E402


def results(case: Case, inputs: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    """The output and all gradients but the bias's, by name."""
    x, *factors = (t for name, t in inputs.items() if name != "bias")
    names = [f"grad {name}" for name in inputs if name != "bias"]
    bias = inputs.get("bias")
    if isinstance(case, Blocks):
        y = cpu_block_diag_matmul.forward(x, *factors, bias)
        grads = cpu_block_diag_matmul.backward(grad, x, *factors, (True, True))
    else:
        y = cpu_monarch_matmul.forward(x, *factors, bias)
        grads = cpu_monarch_matmul.backward(grad, x, *factors, (True, True, True))
    return {"y": y, **{n: g for n, g in zip(names, grads, strict=True) if g is not None}}


def check_here(case: Case) -> None:
    """The launcher alone, as `check` does it."""
    inputs, grad = make(case)
    wide = {name: widened(x) for name, x in inputs.items()}
    exact = run(case, wide, widened(grad), "reference")
    own = run(case, inputs, grad, "reference")
    for name, x in results(case, inputs, grad).items():
        assert x.is_contiguous(), name
        check_close(name, x, own[name], exact[name])


@pytest.mark.parametrize("case", CASES + BLOCKS, ids=str)
def test_against_the_reference(case: Case, isa: str, poisoned: None) -> None:
    check(case, "cpu")


# Sizes about those of registers, panels of rows, tiles of outputs, groups of blocks, chunks.
SIZES = [
    {"k": 16, "q": 16, "p": 16, "l": 16, "s": 16, "N": 130},
    {"k": 16, "q": 48, "p": 3, "l": 32, "s": 8, "N": 65},  # l doesn't divide q, l = 2 groups
    {"k": 4, "q": 20, "p": 10, "l": 40, "s": 30, "N": 33},  # a group that is not full
    {"k": 2, "q": 60, "p": 300, "l": 3, "s": 50, "N": 70},  # sums longer than a part
    {"k": 1, "q": 97, "p": 13, "l": 1, "s": 61, "N": 8},
    {"k": 60, "q": 1, "p": 2, "l": 5, "s": 1, "N": 1},
    {"k": 2, "q": 60, "p": 1100, "l": 30, "s": 40, "N": 2},  # few rows: dot products, in parts
    {"k": 4, "q": 30, "p": 20, "l": 5, "s": 23, "N": 3},
    {"k": 4, "q": 30, "p": 20, "l": 5, "s": 23, "N": 7},
    {"k": 2, "q": 15, "p": 300, "l": 1, "s": 23, "N": 7},
    {"k": 3, "q": 3, "p": 3, "l": 9, "s": 3, "N": 1090},  # more rows than are summed first
    {"k": 32, "q": 70, "p": 66, "l": 35, "s": 68, "N": 150},  # what is between leaves the caches
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", [Case, Blocks])
def test_sizes(kind: type[Case], size: dict[str, int], dtype: torch.dtype, isa: str) -> None:
    check_here(kind(**size, dtype=dtype))


# More than tiles of rows would fetch again and again: threads take blocks for all rows.
MANY_WEIGHTS = Case(k=64, q=128, p=200, l=64, s=200, N=150)


def test_many_weights() -> None:
    check_here(MANY_WEIGHTS)


@settings(max_examples=40, deadline=None)
@given(case=st.one_of(legal_cases(), legal_cases(blocks=True)))
def test_any_legal_shape(case: Case) -> None:
    check_here(case)


THREADED = [
    Case(k=16, q=32, p=32, l=32, s=32, N=300),  # tiles of rows
    Case(k=16, q=32, p=32, l=32, s=32, N=40),  # fewer panels than threads share
    Case(k=2, q=128, p=128, l=2, s=128, N=3),  # parts of blocks
    Case(k=33, q=40, p=37, l=20, s=66, N=1200),  # rounds of rows, out of the caches
    MANY_WEIGHTS,
    Case(k=16, q=32, p=32, l=32, s=32, N=40, dtype=torch.bfloat16),
    Case(k=3, q=60, p=100, l=45, s=25, N=1100, dtype=torch.complex64),
    Blocks(k=16, q=64, p=64, N=300),
    Blocks(k=2, q=256, p=256, N=5),
]


@pytest.mark.parametrize("case", THREADED, ids=str)
def test_the_number_of_threads_changes_nothing(
    case: Case, keep_threads: None, poisoned: None
) -> None:
    inputs, grad = make(case)
    found = []
    for threads in (1, 2, 5, 16, 2):
        torch.set_num_threads(threads)
        found.append(results(case, inputs, grad))
    for other in found[1:]:
        for name, x in found[0].items():
            assert torch.equal(x, other[name]), name


@pytest.mark.parametrize("kind", [Case, Blocks])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_change_nothing(dtype: torch.dtype, kind: type[Case], isa: str) -> None:
    case = kind(k=5, q=24, p=18, l=20, s=9, N=75, dtype=dtype)
    inputs, grad = make(case)
    expected = results(case, inputs, grad)
    for laid_out in (spread, turned, padded):
        strided = {name: laid_out(x) for name, x in inputs.items()}
        for name, x in results(case, strided, laid_out(grad)).items():
            assert torch.equal(x, expected[name]), (laid_out.__name__, name)


def turned(x: Tensor) -> Tensor:
    """The same numbers, the last axis slowest."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def padded(x: Tensor) -> Tensor:
    """The same numbers with others at the ends of the last axis."""
    return torch.nn.functional.pad(x, (3, 2), value=torch.nan)[..., 3:-2]


def test_one_row_for_all() -> None:
    case = Case(k=4, q=8, p=9, l=8, s=6, N=50)
    inputs, grad = make(case)
    many = {**inputs, "x": inputs["x"][:1].expand(50, -1)}
    each = {**inputs, "x": many["x"].contiguous()}
    one = grad[:1].expand(50, -1)
    expected = results(case, each, one.contiguous())
    for name, x in results(case, many, one).items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("wanted", range(8))
def test_what_is_not_wanted_is_not_made(wanted: int) -> None:
    inputs, grad = make(Case(k=4, q=8, p=9, l=8, s=6, N=70))
    x, w1, w2 = (inputs[name] for name in ("x", "w1", "w2"))
    each = (wanted & 1 > 0, wanted & 2 > 0, wanted & 4 > 0)
    expected = cpu_monarch_matmul.backward(grad, x, w1, w2, (True, True, True))
    if wanted <= 1:  # dx alone does not depend on x
        x = torch.full_like(x, torch.nan)
    found = cpu_monarch_matmul.backward(grad, x, w1, w2, each)
    for part, whole, want in zip(found, expected, each, strict=True):
        assert (part is not None) == want
        assert part is None or whole is None or torch.equal(part, whole)


@pytest.mark.parametrize("wanted", [(False, False), (True, False), (False, True)])
def test_what_is_not_wanted_of_blocks(wanted: tuple[bool, bool]) -> None:
    inputs, grad = make(Blocks(k=4, q=8, p=9, N=70))
    x, w = inputs["x"], inputs["w"]
    expected = cpu_block_diag_matmul.backward(grad, x, w, (True, True))
    found = cpu_block_diag_matmul.backward(grad, x, w, wanted)
    for part, whole, want in zip(found, expected, wanted, strict=True):
        assert (part is not None) == want
        assert part is None or whole is None or torch.equal(part, whole)


@pytest.mark.parametrize("N", [1, 5, 20, 70])
def test_infinities_stay_in_their_rows(N: int, isa: str) -> None:
    """Lanes without a row take no part in the factors' gradients."""
    inputs, grad = make(Case(k=4, q=8, p=8, l=8, s=8, N=N, bias=False))
    x, w1, w2 = inputs.values()
    x[-1, 0] = torch.inf
    y = cpu_monarch_matmul.forward(x, w1, w2, None)
    assert y[:-1].isfinite().all()
    assert not y[-1].isfinite().all()
    w1[0, 0, 0] = torch.inf
    dw1 = cpu_monarch_matmul.backward(grad, x.nan_to_num(posinf=1.0), w1, w2, (True,) * 3)[1]
    assert dw1 is not None
    assert dw1.isfinite().all()


def test_long_sums_keep_their_digits() -> None:
    """Of many rows: added up in chunks, not one after another."""
    N = 20_000
    inputs, grad = make(Blocks(k=1, q=2, p=3, N=N))
    x, w = inputs["x"] + 1, inputs["w"]
    dw = cpu_block_diag_matmul.backward(grad + 1, x, w, (False, True))[1]
    assert dw is not None
    exact = (grad + 1).double().mT @ x.double()
    assert (dw[0] - exact).abs().max() <= 8 * torch.finfo(torch.float32).eps * exact.abs().max()
