"""The monarch family as registered operators: opcheck, torch.compile, autocast, torch.func."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kexue_kernels as kk
from kexue_kernels import launchers
from tests.monarch.cases import Blocks, Case, check_close, check_near, dense, make, run, widened

ops = torch.ops.kexue_kernels
CASES = [
    Case(),
    Case(dtype=torch.complex64, bias=False, strided=True),
    Blocks(dtype=torch.bfloat16),
]


def operators(case: Case) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, ...]]]:
    if isinstance(case, Blocks):
        return ops.block_diag_matmul.default, ops.block_diag_matmul_backward.default
    return ops.monarch_matmul.default, ops.monarch_matmul_backward.default


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case: Case) -> None:
    inputs, grad = make(case)
    forward, backward = operators(case)
    leaves = [t.requires_grad_() for t in inputs.values()]
    factors = [t for name, t in inputs.items() if name not in ("x", "bias")]
    torch.library.opcheck(forward, (leaves[0], *factors, inputs.get("bias"), "cpu"))
    for wanted in (True, False):  # the factors' gradients too, or x's alone
        x = leaves[0] if wanted else None
        args = (grad.requires_grad_(), x, *factors, True, *[wanted] * len(factors), "cpu")
        torch.library.opcheck(backward, args)


@pytest.mark.parametrize("case", [Case(N=0), Blocks(q=0)], ids=str)
def test_opcheck_of_what_is_empty(case: Case) -> None:
    inputs, grad = make(case)
    forward, backward = operators(case)
    x, *factors, bias = inputs.values()
    torch.library.opcheck(forward, (x, *factors, bias, "cpu"))
    torch.library.opcheck(backward, (grad, x, *factors, *[True] * (1 + len(factors)), "cpu"))


def loss_of(case: Case) -> Callable[[dict[str, Tensor]], Tensor]:
    def loss(inputs: dict[str, Tensor]) -> Tensor:
        y = case.call({**inputs, "x": 2 * inputs["x"]}, "auto")
        return (y * y.conj()).real.float().sum()

    return loss


def gradients(loss: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor]):
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    value = loss(leaves)
    return value.detach(), *torch.autograd.grad(value, list(leaves.values()))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_whole(case: Case, dynamic: bool) -> None:
    loss = loss_of(case)
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for N, s in ((case.N, case.s), (case.N + 3, case.s + 1)):
        inputs, _ = make(type(case)(**{**vars(case), "N": N, "s": s}))
        pairs = zip(gradients(compiled, inputs), gradients(loss, inputs), strict=True)
        for found, expected in pairs:
            check_near(found, expected)


def test_compiles_with_inductor() -> None:
    case = Case()
    inputs, _ = make(case)
    loss = loss_of(case)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    pairs = zip(gradients(compiled, inputs), gradients(loss, inputs), strict=True)
    for found, expected in pairs:
        check_near(found, expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", [Case(), Blocks()], ids=str)
def test_autocast(case: Case, backend: str) -> None:
    """As torch.nn.functional.linear: everything in autocast's dtype, gradients in their own."""
    inputs, grad = make(case)
    halves = {name: t.bfloat16() for name, t in inputs.items()}
    expected = run(case, halves, grad.bfloat16(), backend)
    mixed = {**inputs, "x": halves["x"]}
    leaves = {name: t.requires_grad_() for name, t in mixed.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = case.call(leaves, backend)
    assert torch.equal(y, expected["y"])
    grads = torch.autograd.grad(y, list(leaves.values()), grad.bfloat16())
    for name, found in zip(leaves, grads, strict=True):
        assert found.dtype == mixed[name].dtype
        assert torch.equal(found.bfloat16(), expected[f"grad {name}"])
    with pytest.raises(ValueError, match="expected dtype bfloat16, got float32"):
        case.call(mixed, backend)


@pytest.mark.parametrize("case", [Case(), Blocks()], ids=str)
def test_a_backward_under_autocast_is_not_rounded(case: Case) -> None:
    inputs, grad = make(case)
    leaves = [t.requires_grad_() for t in inputs.values()]
    y = case.call(inputs, "cpu")
    plain = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(y, leaves, grad)
    for one, other in zip(found, plain, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_doubles_and_complex_numbers_stay_themselves_under_autocast(dtype: torch.dtype) -> None:
    x, w1, w2, bias = (t.to(dtype) for t in make(Case())[0].values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = kk.monarch_matmul(x, w1, w2, bias)
    assert torch.equal(y, kk.monarch_matmul(x, w1, w2, bias))


@pytest.mark.parametrize("case", [Case(N=3), Blocks(N=3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_second_derivatives(case: Case, dtype: torch.dtype) -> None:
    """In every argument, of all first derivatives; against the reference in float64."""
    inputs, grad = make(type(case)(**{**vars(case), "dtype": dtype}))

    def second(inputs: dict[str, Tensor], grad: Tensor, backend: str) -> list[Tensor]:
        leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
        out = grad.detach().requires_grad_()
        y = case.call(leaves, backend)
        values = list(leaves.values())
        first = torch.autograd.grad(y, values, out, create_graph=True)
        total = sum((g * (g.detach() + 1).conj()).real.sum() for g in first)
        return list(torch.autograd.grad(total, [*values, out], materialize_grads=True))

    exact = second({n: widened(t) for n, t in inputs.items()}, widened(grad), "reference")
    own, found = (second(inputs, grad, backend) for backend in ("reference", "cpu"))
    for name, *parts in zip([*inputs, "grad"], found, own, exact, strict=True):
        check_close(name, *parts)


def test_third_derivative() -> None:
    x, w1, w2, _ = (t.requires_grad_() for t in make(Case(N=2))[0].values())

    def third(*leaves: Tensor, backend: str) -> Tensor:
        y = kk.monarch_matmul(*leaves, backend=backend).sum()
        for leaf in leaves:
            y = torch.autograd.grad(y, leaf, create_graph=True)[0].sum()
        return y

    wide = [t.detach().double().requires_grad_() for t in (x, w1, w2)]
    expected = third(*wide, backend="reference").float()
    check_near(third(x, w1, w2, backend="cpu"), expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "mapped", [("x",), ("w1",), ("x", "w2"), ("bias",), ("x", "w1", "w2", "bias")], ids=str
)
def test_vmap(mapped: tuple[str, ...], backend: str) -> None:
    inputs, _ = make(Case(N=4))
    stacked = {
        name: torch.stack([t, t * 2, t - 1], dim=1) if name in mapped else t
        for name, t in inputs.items()
    }
    dims = ({name: 1 if name in mapped else None for name in inputs},)

    def call(tensors: dict[str, Tensor]) -> Tensor:
        return kk.monarch_matmul(**tensors, backend=backend)

    def grads(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return torch.func.grad(lambda t: call(t).square().sum())(tensors)

    each = [
        {name: t.select(1, v) if name in mapped else t for name, t in stacked.items()}
        for v in range(3)
    ]
    found = torch.vmap(call, in_dims=dims)(stacked)
    check_near(found, torch.stack([call(t) for t in each]))
    per_call = torch.vmap(grads, in_dims=dims)(stacked)
    for name, t in per_call.items():
        check_near(t, torch.stack([grads(one)[name] for one in each]))


def test_vmap_of_blocks() -> None:
    x, w, bias = make(Blocks(N=4))[0].values()
    rows = torch.stack([x, 2 * x])
    found = torch.vmap(lambda t: kk.block_diag_matmul(t, w, bias))(rows)
    check_near(found, kk.block_diag_matmul(rows, w, bias))

    def grad_x(row: Tensor, own: Tensor) -> Tensor:
        return torch.func.grad(lambda t: kk.block_diag_matmul(t, own).square().sum())(row)

    for dims, factors in (((0, None), w), ((0, 0), torch.stack([w, -w]))):
        found = torch.vmap(grad_x, in_dims=dims)(rows, factors)
        one = [w, w] if dims[1] is None else list(factors)
        expected = [grad_x(row, own) for row, own in zip(rows, one, strict=True)]
        check_near(found, torch.stack(expected))


def test_torch_func() -> None:
    x, w1, w2, bias = (t for t in make(Case(N=2))[0].values())

    def loss(x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor) -> Tensor:
        return kk.monarch_matmul(x, w1, w2, bias).square().sum()

    leaves = [t.clone().requires_grad_() for t in (x, w1, w2, bias)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.func.grad(loss, argnums=(0, 1, 2, 3))(x, w1, w2, bias)
    for one, other in zip(found, expected, strict=True):
        check_near(one, other)
    hessian = torch.func.jacrev(torch.func.grad(loss))(x, w1, w2, bias)
    W = dense(w1, w2)
    exact = torch.einsum("oi,oj->ij", W, W) * 2
    for n in range(2):
        check_near(hessian[n, :, n], exact)
    assert not hessian[0, :, 1].any()


def test_forward_mode_is_refused() -> None:
    x, w1, w2, _ = make(Case())[0].values()
    with pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
        torch.func.jvp(lambda t: kk.monarch_matmul(t, w1, w2), (x,), (x,))


def test_lazy_conjugates_and_negatives() -> None:
    case = Case(dtype=torch.complex64)
    inputs, grad = make(case)
    lazy = {name: t.conj() for name, t in inputs.items()}
    imaginary = {name: t.conj().imag for name, t in inputs.items()}
    assert imaginary["x"].is_neg()
    for given, g in ((lazy, grad.conj()), (imaginary, grad.conj().imag)):
        own = {name: t.resolve_conj().resolve_neg() for name, t in given.items()}
        expected = run(case, own, g.resolve_conj().resolve_neg(), "cpu")
        for name, found in run(case, given, g, "cpu").items():
            check_near(found, expected[name])


def test_backward_uses_the_forward_backend() -> None:
    """Were it chosen anew, "cuda" would refuse tensors on CPU."""
    inputs, grad = make(Case())
    leaf = inputs["x"].requires_grad_()
    with kk.use_backend("cpu"):
        y = kk.monarch_matmul(**inputs)
    with kk.use_backend("cuda"):
        (found,) = torch.autograd.grad(y, leaf, grad)
    expected = run(Case(), make(Case())[0], grad, "cpu")["grad x"]
    check_near(found, expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_x_and_the_factors_alone_are_saved(frozen: bool) -> None:
    """And not x where no factor learns."""
    x, w1, w2, bias = make(Case())[0].values()
    leaves = (x, bias) if frozen else (x, w1, w2, bias)
    for leaf in leaves:
        leaf.requires_grad_()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.data_ptr()) or t, lambda t: t
    ):
        kk.monarch_matmul(x, w1, w2, bias)
    expected = (w1, w2) if frozen else (x, w1, w2)
    assert sorted(saved) == sorted(t.data_ptr() for t in expected)


def test_no_gradient_is_made_that_nobody_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, grad = make(Case())
    launcher = launchers.launcher_of("monarch", "monarch_matmul", "cpu", inputs["x"])
    asked, backward = [], launcher.backward
    monkeypatch.setattr(
        launcher, "backward", lambda *args: asked.append(args[-1]) or backward(*args)
    )
    for names in (["x"], ["w1"], ["w2", "bias"], ["x", "w1"]):
        leaves = {n: t.detach().requires_grad_(n in names) for n, t in inputs.items()}
        y = kk.monarch_matmul(**leaves, backend="cpu")
        torch.autograd.grad(y, [leaves[n] for n in names], grad)
        assert asked[-1] == tuple(n in names for n in ("x", "w1", "w2"))
    leaf = inputs["bias"].requires_grad_()
    (found,) = torch.autograd.grad(kk.monarch_matmul(**inputs, backend="cpu"), leaf, grad)
    check_near(found, grad.sum(0))
    assert len(asked) == 4


def test_checkpointing_recomputes_the_same_bits() -> None:
    leaves = [t.requires_grad_() for t in make(Case())[0].values()]
    plain = torch.autograd.grad(kk.monarch_matmul(*leaves).sum(), leaves)
    again = torch.utils.checkpoint.checkpoint(kk.monarch_matmul, *leaves, use_reentrant=False)
    for one, other in zip(plain, torch.autograd.grad(again.sum(), leaves), strict=True):
        assert torch.equal(one, other)


def test_what_the_extension_lacks_is_done_in_pytorch(without_extension: None) -> None:
    for op in ("monarch_matmul", "block_diag_matmul"):
        for backend in ("cpu", "auto"):
            found = launchers.launcher_of("monarch", op, backend, torch.zeros(1))
            assert found.__name__ == f"kexue_kernels.monarch.blocked_{op}"
