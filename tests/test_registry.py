"""What looks on at a call beside autograd sees the operators, in every family."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kexue_kernels as kk

Op = Callable[..., Any]

# Name -> the op, and the shapes of what it is given.
OPS: dict[str, tuple[Op, list[tuple[int, ...]]]] = {
    "linear_scan": (kk.linear_scan, [(2, 5, 3), (2, 5, 3)]),
    "selective_scan": (
        kk.selective_scan,
        [(2, 5, 4), (2, 5, 4), (4, 3), (2, 5, 3), (2, 5, 3)],
    ),
    "monarch_matmul": (kk.monarch_matmul, [(5, 6), (2, 4, 3), (4, 3, 2)]),
    "block_diag_matmul": (kk.block_diag_matmul, [(5, 6), (2, 4, 3)]),
    "mla_attention": (
        kk.mla_attention,
        [(1, 4, 2, 3), (1, 4, 2, 2), (1, 4, 5), (1, 4, 2), (2, 3, 5), (2, 3, 5)],
    ),
    "vector_quantize": (
        lambda x, codebook: kk.vector_quantize(x, codebook, gradient="rotation").quantized,
        [(5, 3), (4, 3)],
    ),
}


def inputs(name: str, *, requires_grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = OPS[name][1]
    given = [torch.randn(shape, generator=generator) for shape in shapes]
    return [x.requires_grad_(requires_grad) for x in given]


@pytest.mark.parametrize("name", OPS)
def test_a_trace_has_the_operator(name: str) -> None:
    op = OPS[name][0]
    with warnings.catch_warnings():  # of Python values that checks look at
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(op, inputs(name), check_trace=False)
    assert f"kexue_kernels::{name}" in str(traced.graph)
    others = [2 * x for x in inputs(name)]
    torch.testing.assert_close(traced(*others), op(*others))


@pytest.mark.parametrize("name", OPS)
def test_batched_gradients(name: str) -> None:
    given = inputs(name, requires_grad=True)
    y = OPS[name][0](*given)
    grads = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(1))
    keep = {"retain_graph": True, "allow_unused": True}
    batched = torch.autograd.grad(y, given, grads, is_grads_batched=True, **keep)
    for i, grad in enumerate(grads):
        for each, one in zip(batched, torch.autograd.grad(y, given, grad, **keep), strict=True):
            assert (each is None) == (one is None)
            if one is not None:
                torch.testing.assert_close(each[i], one)
