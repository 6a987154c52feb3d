"""block_diag_matmul: the reference against its definition, blocked PyTorch against it."""

import pytest
import torch
from hypothesis import given, settings

import kexue_kernels as kk
from tests.monarch.cases import (
    BLOCKS,
    Blocks,
    Case,
    check,
    check_near,
    legal_cases,
    make,
    run,
    widened,
)


@settings(max_examples=40, deadline=None)
@given(case=legal_cases(blocks=True))
def test_reference_is_the_definition(case: Case) -> None:
    inputs = {name: widened(x) for name, x in make(case)[0].items()}
    x, w = inputs["x"], inputs["w"]
    expected = x @ torch.block_diag(*w).T + inputs.get("bias", 0)
    check_near(kk.reference.block_diag_matmul(**inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_gradcheck(dtype: torch.dtype) -> None:
    inputs = [x.to(dtype).requires_grad_() for x in make(Blocks(N=3))[0].values()]
    torch.autograd.gradcheck(kk.block_diag_matmul, inputs, fast_mode=True)
    torch.autograd.gradgradcheck(kk.block_diag_matmul, inputs, fast_mode=True)


@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_blocked_pytorch(case: Blocks, without_extension: None, poisoned: None) -> None:
    check(case, "cpu")


@settings(max_examples=40, deadline=None)
@given(case=legal_cases(blocks=True))
def test_any_legal_shape(case: Case) -> None:
    check(case, "cpu")


def test_many_blocks_of_rows(without_extension: None) -> None:
    for dtype in (torch.float32, torch.float16):
        check(Blocks(k=32, q=64, p=32, N=333, dtype=dtype), "cpu")


def test_is_the_first_factor() -> None:
    """With one block of ones behind it, which adds all outputs up."""
    x, w, bias = make(Blocks())[0].values()
    ones = torch.ones(1, 1, w.shape[0] * w.shape[1])
    found = kk.block_diag_matmul(x, w, bias).sum(1, keepdim=True)
    check_near(found, kk.monarch_matmul(x, w, ones) + bias.sum())


def test_any_leading_axes() -> None:
    _, w, bias = make(Blocks())[0].values()
    x = torch.randn(15, 4, 3, 2).permute(3, 1, 2, 0)
    y = kk.block_diag_matmul(x, w, bias)
    assert y.shape == (2, 4, 3, 12)
    check_near(y, x @ torch.block_diag(*w).T + bias)
    assert kk.block_diag_matmul(x[0, 0, 0], w).shape == (12,)
    assert kk.block_diag_matmul(x[:0], w).shape == (0, 4, 3, 12)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("sizes", [{"N": 0}, {"p": 0}, {"q": 0}, {"k": 0}], ids=str)
def test_zero_sizes(sizes: dict[str, int], backend: str) -> None:
    case = Blocks(**sizes)
    inputs, grad = make(case)
    found = run(case, inputs, grad, backend)
    assert torch.equal(found["y"], inputs["bias"].expand(case.N, -1))
    for name in ("x", "w"):
        assert torch.equal(found[f"grad {name}"], torch.zeros_like(inputs[name]))
    assert torch.equal(found["grad bias"], grad.sum(0))
