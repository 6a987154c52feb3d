"""linear_scan's contract: definition, gradients, edge cases. Kernels have files of their own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kexue_kernels as kk
from tests.scan.cases import ALL, PACKED, Case, check, make, run, widened

DOUBLES = (torch.float64, torch.complex128)


def definition(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """h_t = sum over s <= t of (a_{s+1} ... a_t) b_s, plus (a_1 ... a_t) h_0: no recurrence."""
    rows = []
    for t in range(b.shape[1]):
        terms = [a[:, s + 1 : t + 1].prod(1) * b[:, s] for s in range(t + 1)]
        rows.append(sum(terms) + a[:, : t + 1].prod(1) * h)
    return torch.stack(rows, 1)


@pytest.mark.parametrize("dtype", DOUBLES)
def test_reference_is_the_definition(dtype: torch.dtype) -> None:
    a, b, h0 = (torch.randn(*s, dtype=dtype) for s in ((2, 6, 3), (2, 6, 3), (2, 3)))
    h, final = kk.reference.linear_scan(a, b, h0, return_final_state=True)
    torch.testing.assert_close(h, definition(a, b, h0))
    torch.testing.assert_close(final, h[:, -1])
    flipped = kk.reference.linear_scan(a.flip(1), b.flip(1), h0, reverse=True)
    torch.testing.assert_close(flipped.flip(1), h)


@pytest.mark.parametrize("reverse", [False, True])
def test_reference_packed_is_each_sequence_alone(reverse: bool) -> None:
    lengths = [3, 0, 4, 1]
    a, b = torch.randn(2, 1, 8, 2, dtype=torch.float64)
    h0 = torch.randn(4, 2, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 3, 3, 7, 8], dtype=torch.int32)
    h, final = kk.linear_scan(
        a, b, h0, reverse=reverse, cu_seqlens=cu_seqlens, return_final_state=True
    )
    pieces = zip(a.split(lengths, 1), b.split(lengths, 1), h0.split(1), strict=True)
    alone = [
        kk.linear_scan(*piece, reverse=reverse, return_final_state=True)  # type: ignore[misc]
        for piece in pieces
    ]
    torch.testing.assert_close(h, torch.cat([x for x, _ in alone], 1))
    torch.testing.assert_close(final, torch.cat([x for _, x in alone]))
    torch.testing.assert_close(final[1], h0[1])


@pytest.mark.parametrize("case", ALL, ids=str)
def test_blocked_pytorch(case: Case, without_extension: None, poisoned: None) -> None:
    check(case, "cpu")


@pytest.mark.parametrize(
    "case", [Case(L=7, D=2), Case(L=7, D=2, a="channel", reverse=True)], ids=str
)
@pytest.mark.parametrize("dtype", DOUBLES)
def test_reference_gradcheck(case: Case, dtype: torch.dtype) -> None:
    inputs = widened(make(case))
    leaves = [x.to(dtype).requires_grad_() for x in inputs.leaves()]

    def call(a: Tensor, b: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        return kk.linear_scan(a, b, h0, reverse=case.reverse, return_final_state=True)  # type: ignore[return-value]

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


SECOND = (
    [
        Case(L=7, D=2, a=a, dtype=dtype, reverse=reverse)
        for a in ("full", "channel", "step")
        for dtype in (torch.float32, torch.complex64)
        for reverse in (False, True)
    ]
    + [c for c in PACKED if c.dtype != torch.bfloat16]
    + [Case(initial=None)]
)


@pytest.mark.parametrize("case", SECOND, ids=str)
def test_second_and_third_derivatives(case: Case) -> None:
    """Through the operators, against autograd through the reference in float64."""
    inputs, wide = make(case), widened(make(case))
    for found, true in zip(
        derivatives(case, inputs, "cpu"), derivatives(case, wide, "reference"), strict=True
    ):
        scale = 1 + true.abs().max()
        torch.testing.assert_close(found.to(true.dtype) / scale, true / scale, rtol=0, atol=2e-6)


def derivatives(case: Case, inputs, backend: str) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs.leaves()]
    outputs = kk.linear_scan(
        *leaves,
        reverse=case.reverse,
        cu_seqlens=inputs.cu_seqlens,
        return_final_state=True,
        backend=backend,
    )
    found: list[Tensor] = []
    for _ in range(3):
        scalar = sum((x.abs() ** 2 / (1 + n)).sum() for n, x in enumerate(outputs))
        outputs = torch.autograd.grad(scalar, leaves, create_graph=True)
        found += [x.detach() for x in outputs]
    return found


def test_gradient_of_each_output_and_input_alone() -> None:
    case = Case()
    inputs = make(case)
    true = run(case, widened(inputs), "reference")
    for only in ("a", "b", "initial_state"):
        leaves = {"a": inputs.a, "b": inputs.b, "initial_state": inputs.initial_state}
        leaves[only] = leaves[only].clone().requires_grad_()
        h, final = kk.linear_scan(**leaves, return_final_state=True)
        (grad,) = torch.autograd.grad((h, final), leaves[only], (inputs.grad_h, inputs.grad_final))
        torch.testing.assert_close(grad.double(), true[f"grad_{only}"], rtol=1e-4, atol=1e-5)
    a = inputs.a.clone().requires_grad_()
    _, final = kk.linear_scan(a, inputs.b, return_final_state=True)
    (through_final,) = torch.autograd.grad(final.sum(), a)
    h = kk.linear_scan(a, inputs.b)
    (through_h,) = torch.autograd.grad(h[:, -1].sum(), a)
    torch.testing.assert_close(through_final, through_h)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize(("B", "L", "D"), [(2, 0, 3), (0, 4, 3), (2, 4, 0), (0, 0, 0)])
def test_zero_sizes(backend: str, B: int, L: int, D: int) -> None:
    a, b = (torch.randn(B, L, D, requires_grad=True) for _ in range(2))
    h0 = torch.randn(B, D, requires_grad=True)
    h, final = kk.linear_scan(a, b, h0, return_final_state=True, backend=backend)
    assert h.shape == (B, L, D)
    assert final.shape == (B, D)
    if L == 0:
        assert torch.equal(final, h0)
    grads = torch.autograd.grad((h.sum() + (3 * final).sum()), (a, b, h0))
    assert [g.shape for g in grads] == [a.shape, b.shape, h0.shape]
    if L == 0:
        assert torch.equal(grads[2], torch.full_like(h0, 3))


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_no_sequences_at_all(backend: str) -> None:
    cu_seqlens = torch.zeros(1, dtype=torch.int32)
    x = torch.randn(1, 0, 3)
    h, final = kk.linear_scan(x, x, cu_seqlens=cu_seqlens, return_final_state=True, backend=backend)
    assert h.shape == (1, 0, 3)
    assert final.shape == (0, 3)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_an_overflowed_product_leaves_a_zero_state_alone(backend: str) -> None:
    a = torch.full((1, 3000, 2), 1e20)
    h = kk.linear_scan(a, torch.zeros_like(a), backend=backend)
    assert torch.equal(h, torch.zeros_like(h))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_sequences_do_not_touch(backend: str) -> None:
    """A NaN or an infinity stays in its own packed sequence and its own channel."""
    b = torch.randn(1, 40, 4)
    b[0, 3, 1], b[0, 20, 2] = torch.nan, torch.inf
    cu_seqlens = torch.tensor([0, 13, 27, 40])
    h = kk.linear_scan(torch.full((4,), 0.9), b, cu_seqlens=cu_seqlens, backend=backend)
    assert h[0, 27:].isfinite().all()
    assert h[0, :13, [0, 2, 3]].isfinite().all()
    assert h[0, 3:13, 1].isnan().all()
    assert h[0, 20:27, 2].isinf().all()


def test_lazy_conjugates_are_resolved() -> None:
    a, b = torch.randn(2, 2, 6, 3, dtype=torch.complex64)
    found = kk.linear_scan(a.conj(), b.conj(), backend="cpu")
    torch.testing.assert_close(found, kk.linear_scan(a, b, backend="reference").conj())


def test_inputs_are_left_alone_and_outputs_are_new() -> None:
    inputs = make(Case(L=0))
    before = [x.clone() for x in inputs.leaves()]
    _, final = kk.linear_scan(inputs.a, inputs.b, inputs.initial_state, return_final_state=True)
    final.fill_(7)
    assert all(torch.equal(x, y) for x, y in zip(inputs.leaves(), before, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(0, 20)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.complex64]),
    a=st.sampled_from(["full", "channel", "invariant", "batch", "step"]),
    reverse=st.booleans(),
    initial=st.sampled_from([None, "state", "data"]),
    strided=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_case_on_cpu(sizes, dtype, a, reverse, initial, strided, seed) -> None:
    B, L, D = (max(n, 1) for n in sizes)
    check(Case(B, L, D, dtype, a, reverse, None, initial, strided), "cpu", seed=seed)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.complex64]),
    a=st.sampled_from(["full", "channel"]),
    reverse=st.booleans(),
    initial=st.sampled_from([None, "state"]),
    seed=st.integers(0, 1000),
)
def test_any_packing_on_cpu(lengths, dtype, a, reverse, initial, seed) -> None:
    case = Case(1, sum(lengths), 3, dtype, a, reverse, tuple(lengths), initial)
    check(case, "cpu", seed=seed)


def test_determinism_on_cpu() -> None:
    case = Case(B=1, L=5000, D=3, a="channel")
    first, second = run(case, make(case), "cpu"), run(case, make(case), "cpu")
    assert all(torch.equal(first[name], second[name]) for name in first)
