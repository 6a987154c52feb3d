"""The layers on a GPU: as near to float64 as on the CPU, gradients too; steps go on from there."""

import copy

import pytest
import torch
from torch import Tensor, nn

import kexue_kernels as kk
from tests.nn.parts import check_as_near

MAKE = {
    "S4D": lambda: kk.nn.S4D(6, 8),
    "S4D bilinear": lambda: kk.nn.S4D(6, 8, discretization="bilinear"),
    "S4D real": lambda: kk.nn.S4D(6, 8, init="real"),
    "RGLRU": lambda: kk.nn.RGLRU(6, num_blocks=2),
    "MambaMixer": lambda: kk.nn.MambaMixer(6, state_dim=4),
}


def parts(state: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else tuple(state)


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    alone = model(x)
    y, state = model(x, return_state=True)
    total = sum(v.abs().square().sum().float() for v in (alone, y, *parts(state)))
    grads = torch.autograd.grad(total, [x, *model.parameters()])
    return [value.detach().cpu() for value in (alone, y, *parts(state), *grads)]


@pytest.mark.gpu
@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu(name: str, dtype: torch.dtype):
    torch.manual_seed(0)
    model, x = MAKE[name]().to(dtype), torch.randn(3, 300, 6).to(dtype)
    exact = run(copy.deepcopy(model).double(), x.double())
    plain = run(model, x)
    model, x = model.cuda(), x.cuda()
    check_as_near(run(model, x), plain, exact)
    with torch.no_grad():
        _, state = model(x[:, :-1], return_state=True)
        whole, end = model(x, return_state=True)
        y, state = model.step(x[:, -1], state)
    unit = torch.finfo(dtype).eps
    for got, expected in zip((y, *parts(state)), (whole[:, -1], *parts(end)), strict=True):
        assert (got - expected).abs().max() <= 16 * unit * expected.abs().max()


@pytest.mark.gpu
def test_packed_on_gpu():
    torch.manual_seed(0)
    mixer, x = kk.nn.MambaMixer(6, state_dim=4), torch.randn(1, 50, 6)
    cu_seqlens = torch.tensor([0, 20, 20, 50])
    expected = mixer(x, cu_seqlens=cu_seqlens)
    got = mixer.cuda()(x.cuda(), cu_seqlens=cu_seqlens.cuda()).cpu()
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
