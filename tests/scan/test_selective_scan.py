"""selective_scan's contract: definition, gradients, edge cases. Kernels have files of their own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kexue_kernels as kk
from tests.scan.selective_cases import ALL, DTYPES, Case, check, make, run, widened


def definition(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, x0: Tensor) -> Tensor:
    """y_t = C_t (sum over s <= t of exp(A (dt_{s+1} + .. + dt_t)) dt_s B_s u_s + x_0 decayed)."""
    rows = []
    for t in range(u.shape[1]):
        x = torch.exp(dt[:, : t + 1].sum(1)[..., None] * A) * x0  # [batch, d, n]
        for s in range(t + 1):
            decay = torch.exp(dt[:, s + 1 : t + 1].sum(1)[..., None] * A)
            x = x + decay * (dt[:, s] * u[:, s])[..., None] * B[:, s, None]
        y = (C[:, t, None] * x).sum(-1)
        rows.append(2 * y.real if y.is_complex() else y)
    return torch.stack(rows, 1)


@pytest.mark.parametrize("case", [Case(L=5), Case(L=5, complex=True)], ids=str)
def test_reference_is_the_definition(case: Case) -> None:
    i = widened(make(case)).tensors
    dt = torch.nn.functional.softplus(i["delta"] + i["delta_bias"])
    y = definition(i["u"], dt, i["A"], i["B"], i["C"], i["initial_state"])
    expected = (y + i["D"] * i["u"]) * torch.nn.functional.silu(i["z"])
    found = kk.reference.selective_scan(**i, delta_softplus=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "case",
    [
        Case(L=4, d=2, n=2),
        Case(L=3, d=2, n=2, complex=True, B="group", C="invariant"),
        Case(batch=1, L=3, d=2, n=2, lengths=(2, 0, 1)),
    ],
    ids=str,
)
def test_reference_gradcheck(case: Case) -> None:
    inputs = widened(make(case))
    leaves = {name: x.requires_grad_() for name, x in inputs.tensors.items()}

    def call(*values: Tensor) -> tuple[Tensor, Tensor]:
        return kk.selective_scan(  # type: ignore[return-value]
            **dict(zip(leaves, values, strict=True)),
            delta_softplus=True,
            cu_seqlens=inputs.cu_seqlens,
            return_final_state=True,
        )

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(call, tuple(leaves.values()))


@pytest.mark.parametrize("case", ALL, ids=str)
def test_blocked_pytorch(case: Case, without_extension: None, poisoned: None) -> None:
    check(case, "cpu")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_packed_is_each_sequence_alone(backend: str) -> None:
    lengths = [3, 0, 37, 1]
    case = Case(batch=1, L=41, lengths=tuple(lengths), B="group", C="invariant")
    inputs = make(case)
    i = inputs.tensors
    out, final = kk.selective_scan(
        **i, cu_seqlens=inputs.cu_seqlens, return_final_state=True, backend=backend
    )
    steps = {name: i[name].split(lengths, 1) for name in ("u", "delta", "B", "z")}
    for n, (whole, state) in enumerate(zip(out.split(lengths, 1), final, strict=True)):
        own = {name: parts[n] for name, parts in steps.items()}
        alone, last = kk.selective_scan(
            **{**i, **own, "initial_state": i["initial_state"][n : n + 1]},
            return_final_state=True,
            backend=backend,
        )
        torch.testing.assert_close(whole, alone)
        torch.testing.assert_close(state, last[0])
    assert torch.equal(final[1], i["initial_state"][1])


@pytest.mark.parametrize("cuts", [(10,), (1, 2, 33), (32, 64)])
@pytest.mark.parametrize("complex_", [False, True])
def test_chunked_prefill_is_the_whole(cuts: tuple[int, ...], complex_: bool) -> None:
    i = make(Case(L=70, complex=complex_)).tensors
    state = i.pop("initial_state")
    whole, last = kk.selective_scan(**i, initial_state=state, return_final_state=True)
    ys = []
    for start, end in zip((0, *cuts), (*cuts, 70), strict=True):
        part = {k: x[:, start:end] if x.ndim == 3 else x for k, x in i.items()}
        y, state = kk.selective_scan(**part, initial_state=state, return_final_state=True)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), whole)
    torch.testing.assert_close(state, last)


def test_gradient_of_each_input_alone() -> None:
    case = Case()
    inputs = make(case)
    true = run(case, widened(inputs), "reference")
    for name, x in inputs.tensors.items():
        leaf = x.clone().requires_grad_()
        out, final = kk.selective_scan(
            **{**inputs.tensors, name: leaf}, delta_softplus=True, return_final_state=True
        )
        (grad,) = torch.autograd.grad((out, final), leaf, (inputs.grad_out, inputs.grad_final))
        torch.testing.assert_close(grad.double(), true[f"grad_{name}"], rtol=1e-4, atol=1e-4)


def test_gradient_of_each_output_alone() -> None:
    case = Case(z=False, D=False)
    i = make(case).tensors
    u = i["u"].requires_grad_()
    options = {**i, "delta_softplus": True, "return_final_state": True}
    wide = {k: x.detach().double() for k, x in i.items()}
    wide_u = wide["u"].requires_grad_()
    for output in (0, 1):
        found = torch.autograd.grad(kk.selective_scan(**options)[output].sum(), u)[0]
        exact = kk.selective_scan(**wide, delta_softplus=True, return_final_state=True)[output]
        true = torch.autograd.grad(exact.sum(), wide_u)[0]
        torch.testing.assert_close(found.double(), true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize(("batch", "L", "d", "n"), [(2, 0, 4, 3), (0, 5, 4, 3), (2, 5, 0, 3)])
def test_zero_sizes(backend: str, batch: int, L: int, d: int, n: int) -> None:
    i = {k: x.requires_grad_() for k, x in make(Case(batch, L, d, n)).tensors.items()}
    out, final = kk.selective_scan(**i, return_final_state=True, backend=backend)
    assert out.shape == (batch, L, d)
    assert final.shape == (batch, d, n)
    grads = torch.autograd.grad(out.sum() + (3 * final).sum(), tuple(i.values()), allow_unused=True)
    for grad, (name, x) in zip(grads, i.items(), strict=True):
        assert grad is None or grad.shape == x.shape, name
    if L == 0:
        assert torch.equal(final, i["initial_state"])
        assert torch.equal(grads[-1], torch.full_like(final, 3))


def test_no_state_at_all() -> None:
    i = make(Case(n=0)).tensors
    out = kk.selective_scan(**i)
    expected = i["D"] * i["u"] * torch.nn.functional.silu(i["z"])
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_second_derivative_is_refused(backend: str) -> None:
    i = {k: x.requires_grad_() for k, x in make(Case(L=3)).tensors.items()}
    out = kk.selective_scan(**i, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), i["u"], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.autograd.grad(grad.sum(), i["delta"])


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_sequences_and_channels_do_not_touch(backend: str) -> None:
    i = make(Case(batch=1, L=40, lengths=(13, 14, 13), initial=False, softplus=False))
    i.tensors["u"][0, 3, 1] = torch.nan
    i.tensors["u"][0, 20, 2] = torch.inf
    out = kk.selective_scan(**i.tensors, cu_seqlens=i.cu_seqlens, backend=backend)
    assert out[0, 27:].isfinite().all()
    assert out[0, :13, [0, 2, 3]].isfinite().all()
    assert out[0, 3:13, 1].isnan().all()
    assert out[0, 13:20].isfinite().all()
    assert not out[0, 20, 2].isfinite()


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_extreme_steps(backend: str) -> None:
    """A huge step forgets everything, a tiny one changes nothing; neither makes a NaN."""
    u, delta = torch.randn(1, 6, 4), torch.zeros(1, 6, 4)
    delta[0, 2], delta[0, 4] = 1e4, -1e4
    A = -torch.rand(4, 3) - 0.5
    B, C = torch.randn(2, 1, 6, 3)
    x0 = torch.randn(1, 4, 3)
    out, final = kk.selective_scan(
        u, delta, A, B, C, None, None, None, True,
        initial_state=x0, return_final_state=True, backend=backend,
    )  # fmt: skip
    wide = [x.double() for x in (u, delta, A, B, C)]
    exact = kk.reference.selective_scan(*wide, delta_softplus=True, initial_state=x0.double())
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-3)
    assert final.isfinite().all()


def test_determinism_on_cpu() -> None:
    case = Case(batch=1, L=300, d=33, n=5)
    first, second = (run(case, make(case), "cpu") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_nothing_is_kept_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    operator = torch.ops.kexue_kernels.selective_scan.default
    i = make(Case()).tensors
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
    args = [i[name] for name in names]
    for keep in (False, True):
        _, _, checkpoints = operator(*args, None, True, False, keep, "cpu")
        kept.append(checkpoints.numel())
    assert kept == [0, 2 * 1 * 3 * 6]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 9), st.integers(1, 18)),
    dtype=st.sampled_from(DTYPES),
    complex_=st.booleans(),
    kinds=st.tuples(*[st.sampled_from(["step", "group", "invariant"])] * 2),
    options=st.tuples(*[st.booleans()] * 6),
    seed=st.integers(0, 1000),
)
def test_any_case_on_cpu(sizes, dtype, complex_, kinds, options, seed) -> None:
    batch, L, d, n = sizes
    d = 2 * d if "group" in kinds else d
    check(
        Case(batch, L, d, n, dtype, complex_, *kinds, *options[:5], None, options[5]),
        "cpu",
        seed=seed,
    )


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any),
    dtype=st.sampled_from(DTYPES),
    complex_=st.booleans(),
    initial=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_packing_on_cpu(lengths, dtype, complex_, initial, seed) -> None:
    case = Case(1, sum(lengths), 3, 2, dtype, complex_, initial=initial, lengths=tuple(lengths))
    check(case, "cpu", seed=seed)
