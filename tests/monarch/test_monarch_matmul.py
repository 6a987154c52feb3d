"""monarch_matmul: the reference against its definition, blocked PyTorch against the reference."""

import importlib.util
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import kexue_kernels as kk
from tests.monarch.cases import (
    CASES,
    DTYPES,
    Case,
    check,
    check_near,
    dense,
    error,
    legal_cases,
    make,
    run,
    through_permutations,
    widened,
)

DOUBLES = (torch.float64, torch.complex128)


def doubles(case: Case, dtype: torch.dtype, grad: bool = False) -> list[Tensor]:
    inputs, _ = make(case)
    return [x.to(dtype).requires_grad_(grad) for x in inputs.values()]


@settings(max_examples=60, deadline=None)
@given(case=legal_cases())
def test_reference_is_the_definition(case: Case) -> None:
    inputs, _ = make(case)
    x, w1, w2 = (widened(inputs[name]) for name in ("x", "w1", "w2"))
    bias = widened(inputs["bias"]) if case.bias else 0
    W = dense(w1, w2)
    check_near(kk.reference.monarch_to_dense(w1, w2), W)
    y = kk.reference.monarch_matmul(x, w1, w2, bias if case.bias else None)
    check_near(y, x @ W.T + bias)


@pytest.mark.parametrize("dtype", DOUBLES, ids=str)
@pytest.mark.parametrize("case", [Case(N=2), Case(k=2, q=3, p=2, l=2, s=2, N=3)], ids=str)
def test_gradcheck(case: Case, dtype: torch.dtype) -> None:
    inputs = doubles(case, dtype, grad=True)
    torch.autograd.gradcheck(kk.monarch_matmul, inputs, fast_mode=True)
    torch.autograd.gradgradcheck(kk.monarch_matmul, inputs, fast_mode=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocked_pytorch(case: Case, without_extension: None, poisoned: None) -> None:
    check(case, "cpu")


@settings(max_examples=60, deadline=None)
@given(case=legal_cases())
def test_any_legal_shape(case: Case) -> None:
    check(case, "cpu")


def test_many_blocks_of_rows(without_extension: None) -> None:
    check(Case(k=32, q=16, p=32, l=16, s=64, N=333), "cpu")
    check(Case(k=32, q=16, p=32, l=16, s=64, N=333, dtype=torch.bfloat16), "cpu")


@pytest.mark.parametrize("leading", [(), (2, 3), (1,), (0,), (2, 0, 3)], ids=str)
def test_any_leading_axes(leading: tuple[int, ...]) -> None:
    (x, w1, w2, bias), _ = _listed(Case(N=1))
    rows = torch.randn(*leading, x.shape[-1])
    y = kk.monarch_matmul(rows, w1, w2, bias)
    assert y.shape == (*leading, bias.shape[0])
    check_near(y, rows @ dense(w1, w2).T + bias)


def test_leading_axes_of_any_strides() -> None:
    (_, w1, w2, bias), _ = _listed(Case())
    x = torch.randn(15, 4, 3, 2).permute(3, 1, 2, 0)
    check_near(kk.monarch_matmul(x, w1, w2, bias), kk.monarch_matmul(x.contiguous(), w1, w2, bias))
    row = torch.randn(15).expand(4, 15)
    check_near(kk.monarch_matmul(row, w1, w2)[3], kk.monarch_matmul(row[0], w1, w2))


ZEROS = [
    {"N": 0},
    {"p": 0},
    {"q": 0},
    {"s": 0},
    {"k": 0, "l": 2},
    {"q": 0, "l": 5, "N": 0},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("sizes", ZEROS, ids=str)
def test_zero_sizes(sizes: dict[str, int], backend: str, dtype: torch.dtype) -> None:
    """A sum without terms is zero; the bias is still added."""
    case = Case(**sizes, dtype=dtype)
    inputs, grad = make(case)
    found = run(case, inputs, grad, backend)
    check_near(found["y"], inputs["bias"].expand(case.N, -1))
    for name in ("x", "w1", "w2"):
        assert torch.equal(found[f"grad {name}"], torch.zeros_like(inputs[name]))
    check_near(found["grad bias"], grad.sum(0))


def test_no_blocks_in_the_second_factor() -> None:
    """l = 0 asks for k q = 0: an output without features."""
    x, w1, w2 = torch.randn(3, 6), torch.randn(2, 0, 3), torch.randn(0, 4, 5)
    for backend in ("cpu", "reference"):
        assert kk.monarch_matmul(x, w1, w2, backend=backend).shape == (3, 0)


@pytest.mark.parametrize("dtype", [*DTYPES, *DOUBLES], ids=str)
def test_to_dense(dtype: torch.dtype) -> None:
    _, w1, w2, _ = (x.to(dtype).requires_grad_() for x in make(Case())[0].values())
    W, exact = kk.monarch_to_dense(w1, w2), dense(widened(w1), widened(w2))
    grad = torch.randint(-2, 3, W.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = W, *torch.autograd.grad(W, (w1, w2), grad)
    true = exact, *torch.autograd.grad(exact, (w1, w2), widened(grad))
    for x, expected in zip(found, true, strict=True):
        assert x.dtype == dtype
        assert error(x, expected) <= 4 * torch.finfo(dtype).eps * expected.abs().max()


def test_reference_takes_its_arguments_by_name() -> None:
    inputs, _ = make(Case())
    factors = {name: inputs[name] for name in ("w1", "w2")}
    y = kk.reference.monarch_matmul(**inputs)
    W = kk.reference.monarch_to_dense(**factors)
    check_near(y, inputs["x"] @ W.T + inputs["bias"])
    w1, w2, error = kk.reference.project_to_monarch(weight=W, nblocks=(3, 6), rank=2)
    check_near(kk.monarch_to_dense(w1, w2), W)
    assert error < 1e-6


# ---- the convention of fly and torch-structured

ON_ITS_DOMAIN = [
    Case(k=4, q=4, p=4, l=4, s=4, N=5),
    Case(k=2, q=6, p=3, l=3, s=5, N=4),
    Case(k=3, q=4, p=5, l=6, s=7, N=9),
    Case(k=5, q=2, p=3, l=10, s=2, N=3, dtype=torch.complex64),
]


@pytest.mark.parametrize("case", ON_ITS_DOMAIN, ids=str)
def test_is_blockdiag_butterfly_multiply(case: Case) -> None:
    _compare(through_permutations, case)


@pytest.mark.skipif(
    importlib.util.find_spec("torch_structured") is None, reason="torch-structured isn't installed"
)
@pytest.mark.parametrize("case", ON_ITS_DOMAIN, ids=str)
def test_is_torch_structured(case: Case) -> None:
    from torch_structured.monarch.blockdiag_butterfly_multiply import blockdiag_butterfly_multiply

    _compare(blockdiag_butterfly_multiply, case)


def _compare(theirs: Callable[..., Tensor], case: Case) -> None:
    (x, w1, w2), grad = _listed(Case(**{**vars(case), "bias": False}))
    leaves = [t.requires_grad_() for t in (x, w1, w2)]
    ours, other = kk.monarch_matmul(*leaves), theirs(*leaves)
    check_near(ours, other)
    grads = (torch.autograd.grad(y, leaves, grad) for y in (ours, other))
    for found, expected in zip(*grads, strict=True):
        check_near(found, expected)


def _listed(case: Case) -> tuple[list[Tensor], Tensor]:
    inputs, grad = make(case)
    return list(inputs.values()), grad
