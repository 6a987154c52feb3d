"""mla_attention as registered operators: opcheck, torch.compile, autocast, torch.func."""

import pytest
import torch
from torch import Tensor

import kexue_kernels as kk
from kexue_kernels.mla import attention_operators
from tests.mla.attention_cases import NAMES, Case, attend, make, packed, run

ops = torch.ops.kexue_kernels
SMALL = Case(1, 9, 2, 4, 2, 3, 5)
PACKED = packed(4, 0, 5, H=2, dk=4, dr=2, dv=3, dc=5)


def inputs_of(case: Case, requires_grad: bool = False) -> tuple[Tensor, ...]:
    inputs = make(case)
    return tuple(inputs[name].requires_grad_(requires_grad) for name in NAMES)


@pytest.mark.parametrize("case", [SMALL, PACKED], ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_forward(case: Case, requires_grad: bool) -> None:
    args = *inputs_of(case, requires_grad), case.cu_seqlens(), 0.4, True, "cpu"
    torch.library.opcheck(ops.mla_attention.default, args)


@pytest.mark.parametrize("wanted", [(True,) * 6, (True, False, False, True, False, True)], ids=str)
@pytest.mark.parametrize("case", [SMALL, PACKED], ids=str)
def test_opcheck_backward(case: Case, wanted: tuple[bool, ...]) -> None:
    data, options = inputs_of(case), (case.cu_seqlens(), 0.4, True)
    out, lse = attention_operators.mla_attention(*data, *options, "cpu")
    args = torch.ones_like(out), *data, out, lse, *options, *wanted, "cpu"
    torch.library.opcheck(ops.mla_attention_backward.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_compiles_whole(dynamic: bool, scale: float | None) -> None:
    def function(*data: Tensor) -> Tensor:
        return kk.mla_attention(*(2 * x for x in data), softmax_scale=scale).sin()

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (9, 12):
        data = inputs_of(Case(2, T, 2, 4, 2, 3, 5), requires_grad=True)
        mine, theirs = compiled(*data), function(*data)
        torch.testing.assert_close(mine, theirs)
        grads = zip(*(torch.autograd.grad(y.sum(), data) for y in (mine, theirs)), strict=True)
        for own, other in grads:
            torch.testing.assert_close(own, other)


def test_compiles_with_packed_sequences() -> None:
    compiled = torch.compile(kk.mla_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    data, cu_seqlens = inputs_of(PACKED), PACKED.cu_seqlens()
    torch.testing.assert_close(compiled(*data, cu_seqlens=cu_seqlens), attend(PACKED, data))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_takes_all_in_its_dtype(dtype: torch.dtype) -> None:
    inputs = make(SMALL)
    mixed = {name: x.to(dtype) if "w_" in name else x for name, x in inputs.items()}
    mixed["grad"] = inputs["grad"].to(dtype)
    rounded = {name: x.to(dtype) for name, x in inputs.items()}
    with torch.autocast("cpu", dtype):
        found = run(SMALL, mixed, "auto")
    for name, x in run(SMALL, rounded, "auto").items():
        assert torch.equal(found[name].to(dtype), x)
        assert found[name].dtype == (dtype if name == "out" or "w_" in name else torch.float32)


def test_autocast_leaves_doubles_alone() -> None:
    data = [x.double() for x in inputs_of(SMALL)]
    with torch.autocast("cpu", torch.bfloat16):
        found = kk.mla_attention(*data)
    assert found.dtype == torch.float64
    assert torch.equal(found, kk.mla_attention(*data))


def test_vmap_maps_one_by_one() -> None:
    data = inputs_of(SMALL)
    queries = torch.stack([data[0], 2 * data[0]], 1)
    weights = torch.stack([data[4], 3 * data[4]])

    def attend(query: Tensor, weight: Tensor) -> Tensor:
        return kk.mla_attention(query, *data[1:4], weight, data[5])

    found = torch.func.vmap(attend, in_dims=(1, 0))(queries, weights)
    expected = [attend(queries[:, i], weights[i]) for i in range(2)]
    assert torch.equal(found, torch.stack(expected))


def test_func_grad_and_its_vmap() -> None:
    data = inputs_of(SMALL)

    def loss(latent: Tensor) -> Tensor:
        return kk.mla_attention(*data[:2], latent, *data[3:]).square().sum()

    latents = torch.stack([data[2], 2 * data[2]])
    found = torch.func.vmap(torch.func.grad(loss))(latents)
    for latent, grad in zip(latents, found, strict=True):
        leaf = latent.clone().requires_grad_()
        torch.testing.assert_close(grad, torch.autograd.grad(loss(leaf), leaf)[0])


def test_the_gradient_of_the_gradient_is_refused() -> None:
    data = inputs_of(SMALL, requires_grad=True)
    (grad,) = torch.autograd.grad(attend(SMALL, data).sum(), data[0], create_graph=True)
    with pytest.raises(RuntimeError, match="the gradient of mla_attention can't be differentiated"):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(
        attend(SMALL, data, "reference").sum(), data[0], create_graph=True
    )
    grad.sum().backward()
    assert data[5].grad is not None


def test_what_training_keeps() -> None:
    """Beside the inputs and the output, a number for each query and head."""
    case = Case()
    data = inputs_of(case, requires_grad=True)
    own = {x.data_ptr() for x in data}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = attend(case, data)
    others = [x for x in kept if x.data_ptr() not in own | {out.data_ptr()}]
    assert [(x.shape, x.dtype) for x in others] == [((case.B, case.H, case.T), torch.float32)]


def test_lazy_negation_is_seen() -> None:
    data = list(inputs_of(SMALL))
    plain = attend(SMALL, (*data[:2], -data[2], *data[3:]))
    data[2] = torch._neg_view(data[2])
    assert torch.equal(attend(SMALL, tuple(data)), plain)
