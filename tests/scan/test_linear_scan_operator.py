"""linear_scan as a registered operator: opcheck, torch.compile, autocast, torch.func."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kexue_kernels as kk
from tests.scan.cases import Case, Inputs, make, packed, run

forward = torch.ops.kexue_kernels.linear_scan.default
backward = torch.ops.kexue_kernels.linear_scan_backward.default
CASES = [
    Case(),
    Case(dtype=torch.complex64, a="channel", reverse=True),
    Case(dtype=torch.bfloat16, initial=None),
    packed((3, 0, 5)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_opcheck(case: Case, backend: str) -> None:
    inputs = make(case)
    a, b, h0 = (
        None if x is None else x.requires_grad_()
        for x in (inputs.a, inputs.b, inputs.initial_state)
    )
    torch.library.opcheck(forward, (a, b, h0, inputs.cu_seqlens, case.reverse, True, backend))
    final = inputs.grad_final.requires_grad_()
    rest = (inputs.grad_h, final, inputs.cu_seqlens, case.reverse, backend)
    torch.library.opcheck(backward, (a, b.detach(), h0, *rest))
    torch.library.opcheck(backward, (a, None, h0, *rest))


def loss_of(case: Case, inputs: Inputs) -> Callable[..., Tensor]:
    def loss(a: Tensor, b: Tensor, h0: Tensor | None) -> Tensor:
        h, final = kk.linear_scan(
            a,
            b * 2,
            h0,
            reverse=case.reverse,
            cu_seqlens=inputs.cu_seqlens,
            return_final_state=True,
        )
        return (h * h.conj()).real.float().sum() + (final * final.conj()).real.sum()

    return loss


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_whole(case: Case, dynamic: bool) -> None:
    inputs = make(case)
    loss = loss_of(case, inputs)
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (case.L, case.L + 3) if case.lengths is None else (case.L,):
        again = make(Case(**{**vars(case), "L": length}))
        leaves = [again.a, again.b, again.initial_state]
        used = [x.requires_grad_() for x in leaves if x is not None]
        eager = torch.autograd.grad(loss(*leaves), used)
        traced = torch.autograd.grad(compiled(*leaves), used)
        for x, y in zip(traced, eager, strict=True):
            torch.testing.assert_close(x, y)


def test_compiles_with_inductor() -> None:
    case = Case(a="channel")
    inputs = make(case)
    loss = loss_of(case, inputs)
    leaves = [inputs.a.requires_grad_(), inputs.b.requires_grad_(), inputs.initial_state]
    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(compiled(*leaves), loss(*leaves))
    found = torch.autograd.grad(compiled(*leaves), leaves[:2])
    for x, y in zip(found, torch.autograd.grad(loss(*leaves), leaves[:2]), strict=True):
        torch.testing.assert_close(x, y)


def test_bad_input_is_named_when_compiling() -> None:
    compiled = torch.compile(kk.linear_scan, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="broadcasts to b's"):
        compiled(torch.randn(4), torch.randn(2, 6, 3))


def test_autocast_promotes_a_mix() -> None:
    a, b = torch.rand(2, 9, 3), torch.randn(2, 9, 3, dtype=torch.bfloat16)
    a.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = kk.linear_scan(a, b)
    assert h.dtype == torch.float32
    (grad,) = torch.autograd.grad(h.sum(), a)
    assert grad.dtype == torch.float32
    torch.testing.assert_close(h, kk.linear_scan(a, b.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kk.linear_scan(b, b).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="a: expected dtype bfloat16, got float32"):
        kk.linear_scan(a, b)


def test_autocast_takes_a_half_state() -> None:
    a, b, state = torch.rand(2, 9, 3), torch.randn(2, 9, 3), torch.randn(2, 3).bfloat16()
    with torch.autocast("cpu"):
        h = kk.linear_scan(a, b, state)
    assert torch.equal(h, kk.linear_scan(a, b, state.float()))
    with (
        torch.autocast("cpu"),
        pytest.raises(ValueError, match="a: expected dtype float32, got int64"),
    ):
        kk.linear_scan(a.long(), b)


def test_meta_tensors_have_shapes() -> None:
    b, cu_seqlens = torch.empty(1, 5, 3, device="meta"), torch.empty(3, device="meta").int()
    for dtype in (torch.float32, torch.float64):
        a = b.to(dtype)
        h, state = kk.linear_scan(a, a, cu_seqlens=cu_seqlens, return_final_state=True)
        assert (h.shape, state.shape) == ((1, 5, 3), (2, 3))


def test_vmap_over_nothing() -> None:
    def scan(a: Tensor, b: Tensor) -> Tensor:
        return torch.func.grad(lambda a: kk.linear_scan(a, b).sum())(a)

    assert torch.func.vmap(scan)(torch.rand(0, 3), torch.randn(0, 2, 4, 3)).shape == (0, 3)


IN_DIMS = [(None, 0, None), (0, 1, 0), (0, None, None), (None, 2, 1), (1, 0, None)]


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
@pytest.mark.parametrize("lengths", [None, (3, 0, 4)], ids=["dense", "packed"])
@pytest.mark.parametrize("channel", [False, True])
def test_vmap(
    in_dims: tuple[int | None, ...], lengths: tuple[int, ...] | None, channel: bool
) -> None:
    V, (B, L, D) = 3, (2, 7, 4) if lengths is None else (1, 7, 4)
    rows = B if lengths is None else len(lengths)
    cu_seqlens = None if lengths is None else torch.tensor([0, 3, 3, 7])
    shapes = [(L, D) if channel else (B, L, D), (B, L, D), (rows, D)]
    args = [
        torch.randn(shape if dim is None else (*shape[:dim], V, *shape[dim:]))
        for shape, dim in zip(shapes, in_dims, strict=True)
    ]

    def call(a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        return kk.linear_scan(a, b, h0, cu_seqlens=cu_seqlens, return_final_state=True)  # type: ignore[return-value]

    def gradients(a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensor, ...]:
        def loss(*leaves: Tensor) -> Tensor:
            h, final = call(*leaves)
            return h.square().sum() + final.square().sum()

        return torch.func.grad(loss, argnums=(0, 1, 2))(a, b, h0)

    for function in (call, gradients):
        found = torch.vmap(function, in_dims=in_dims)(*args)
        each = []
        for v in range(V):
            one = [x if d is None else x.select(d, v) for x, d in zip(args, in_dims, strict=True)]
            each.append(function(*one))
        for x, y in zip(found, map(torch.stack, zip(*each, strict=True)), strict=True):
            torch.testing.assert_close(x, y)


def test_vmap_over_cu_seqlens_is_refused() -> None:
    x, cu_seqlens = torch.randn(1, 4, 2), torch.tensor([[0, 4], [0, 4]])
    with pytest.raises(ValueError, match="cu_seqlens: can't be mapped over"):
        torch.vmap(lambda c: kk.linear_scan(x, x, cu_seqlens=c))(cu_seqlens)


def test_torch_func() -> None:
    a, b = torch.rand(4, dtype=torch.float32), torch.randn(2, 5, 4)

    def loss(a: Tensor) -> Tensor:
        return kk.linear_scan(a, b).square().sum()

    leaf = a.clone().requires_grad_()
    (plain,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    torch.testing.assert_close(torch.func.grad(loss)(a), plain.detach())
    hessian = torch.stack([torch.autograd.grad(g, leaf, retain_graph=True)[0] for g in plain])
    torch.testing.assert_close(torch.func.jacrev(torch.func.grad(loss))(a), hessian)


def test_forward_mode_is_refused() -> None:
    a, b = torch.rand(4), torch.randn(2, 5, 4)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
        torch.func.jvp(lambda x: kk.linear_scan(a, x), (b,), (b,))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"),
    ):
        kk.linear_scan(a, torch.autograd.forward_ad.make_dual(b, b))


def test_backward_uses_the_forward_backend() -> None:
    case = Case(L=6)
    inputs = make(case)
    leaf = inputs.b.requires_grad_()
    with kk.use_backend("triton"):
        h = kk.linear_scan(inputs.a, leaf)
    assert h.grad_fn is not None
    torch.autograd.grad(h.sum(), leaf)
    expected = run(case, make(case), "triton")["h"]
    torch.testing.assert_close(kk.linear_scan(inputs.a, leaf, inputs.initial_state), expected)


def test_nothing_is_kept_that_is_not_needed() -> None:
    """With a constant `a` only the small tensors are saved: h may be freed."""
    a, b = torch.rand(3), torch.randn(1, 8, 3, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.numel()) or x, lambda x: x
    ):
        kk.linear_scan(a, b)
    assert saved == [3]
