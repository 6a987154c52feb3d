"""selective_scan as a registered operator: opcheck, torch.compile, autocast, torch.func."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kexue_kernels as kk
from tests.scan.selective_cases import NAMES, Case, Inputs, make, packed

forward = torch.ops.kexue_kernels.selective_scan.default
backward = torch.ops.kexue_kernels.selective_scan_backward.default
CASES = [
    Case(L=7),
    Case(L=7, complex=True, C="invariant", D=False, z=False),
    Case(L=7, dtype=torch.bfloat16, B="group", bias=False, initial=False),
    packed((3, 0, 5), d=2, n=2),
]


def positional(inputs: Inputs) -> list[Tensor | None]:
    return [inputs.tensors.get(name) for name in NAMES]


IN_THE_INTERPRETER = [Case(batch=1, L=3, d=2, n=2), packed((3, 0, 1), d=1, n=1, complex=True)]


@pytest.mark.parametrize(
    ("case", "backend"),
    [*((case, "cpu") for case in CASES), *((case, "triton") for case in IN_THE_INTERPRETER)],
    ids=str,
)
def test_opcheck(case: Case, backend: str) -> None:
    inputs = make(case)
    args = [None if x is None else x.requires_grad_() for x in positional(inputs)]
    torch.library.opcheck(forward, (*args, inputs.cu_seqlens, case.softplus, True, True, backend))
    with torch.no_grad():
        checkpoints = forward(*args, inputs.cu_seqlens, case.softplus, False, True, backend)[2]
    plain = [None if x is None else x.detach() for x in args]
    rest = (*plain, inputs.cu_seqlens, checkpoints, case.softplus, backend)
    torch.library.opcheck(backward, (inputs.grad_out, inputs.grad_final, *rest))
    torch.library.opcheck(backward, (inputs.grad_out, None, *rest))


def loss_of(inputs: Inputs, case: Case) -> Callable[..., Tensor]:
    def loss(**tensors: Tensor) -> Tensor:
        tensors["u"] = 2 * tensors["u"]
        out, final = kk.selective_scan(
            **tensors,
            delta_softplus=case.softplus,
            cu_seqlens=inputs.cu_seqlens,
            return_final_state=True,
        )
        return out.float().square().sum() + (final * final.conj()).real.sum()

    return loss


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_whole(case: Case, dynamic: bool) -> None:
    inputs = make(case)
    loss = loss_of(inputs, case)
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (case.L, case.L + 3) if case.lengths is None else (case.L,):
        again = make(Case(**{**vars(case), "L": length})).tensors
        used = [x.requires_grad_() for x in again.values()]
        eager = torch.autograd.grad(loss(**again), used)
        traced = torch.autograd.grad(compiled(**again), used)
        for x, y in zip(traced, eager, strict=True):
            torch.testing.assert_close(x, y)


def test_compiles_with_inductor() -> None:
    case = Case(L=9)
    inputs = make(case)
    loss = loss_of(inputs, case)
    leaves = [x.requires_grad_() for x in inputs.tensors.values()]
    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(compiled(**inputs.tensors), loss(**inputs.tensors))
    found = torch.autograd.grad(compiled(**inputs.tensors), leaves)
    for x, y in zip(found, torch.autograd.grad(loss(**inputs.tensors), leaves), strict=True):
        torch.testing.assert_close(x, y)


def test_autocast_promotes_the_data() -> None:
    i = make(Case()).tensors
    i["B"], i["delta"] = i["B"].bfloat16(), i["delta"].bfloat16()
    with pytest.raises(ValueError, match="delta: expected dtype float32, got bfloat16"):
        kk.selective_scan(**i)
    with torch.autocast("cpu"):
        out = kk.selective_scan(**i)
    expected = kk.selective_scan(**{**i, "B": i["B"].float(), "delta": i["delta"].float()})
    assert torch.equal(out, expected)


def test_autocast_takes_half_states_and_parameters() -> None:
    i = make(Case()).tensors
    halves = {name: i[name].bfloat16() for name in ("D", "delta_bias", "initial_state")}
    with torch.autocast("cpu"):
        out = kk.selective_scan(**{**i, **halves})
    assert torch.equal(out, kk.selective_scan(**{**i, **{k: x.float() for k, x in halves.items()}}))


EMPTY = [Case(batch=0), Case(L=0), Case(d=0), Case(n=0), packed((0, 0)), packed((2, 0), n=0)]


@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_zero_sizes_compile(case: Case) -> None:
    inputs = make(case)
    loss = loss_of(inputs, case)
    leaves = [x.requires_grad_() for x in inputs.tensors.values()]
    eager = torch.autograd.grad(loss(**inputs.tensors), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    traced = torch.autograd.grad(compiled(**inputs.tensors), leaves)
    torch.testing.assert_close(traced, eager)


def test_meta_tensors_have_shapes_and_gradients() -> None:
    for dtype in (torch.float32, torch.float64):
        i = {name: x.to("meta", dtype) for name, x in make(Case()).tensors.items()}
        leaves = [x.requires_grad_() for x in i.values()]
        out = kk.selective_scan(**i)
        grads = torch.autograd.grad(out.sum(), leaves)
        assert out.shape == i["u"].shape
        assert [x.shape for x in grads] == [x.shape for x in leaves]


def test_vmap_over_nothing() -> None:
    i = make(Case()).tensors
    none = {name: x[None][:0] for name, x in i.items()}
    out = torch.func.vmap(lambda m: kk.selective_scan(**m))(none)
    assert out.shape == (0, *i["u"].shape)


def test_vmap_is_each_call_alone() -> None:
    one, two = (make(Case(L=6), seed=seed).tensors for seed in (0, 1))
    stacked = {name: torch.stack([one[name], two[name]]) for name in one}
    shared = {**stacked, "A": one["A"]}

    def scan(tensors: dict[str, Tensor]) -> Tensor:
        return kk.selective_scan(**tensors, delta_softplus=True)

    dims = ({name: None if name == "A" else 0 for name in one},)
    found = torch.func.vmap(scan, in_dims=dims)(shared)
    expected = [scan(one), scan({**two, "A": one["A"]})]
    torch.testing.assert_close(found, torch.stack(expected))


def test_per_sample_gradients() -> None:
    i = make(Case(L=6, B="group")).tensors
    names = ("u", "delta", "B", "C", "z", "initial_state")

    def loss(A: Tensor, sample: dict[str, Tensor]) -> Tensor:
        one = {name: x[None] for name, x in sample.items()}
        rest = {"D": i["D"], "delta_bias": i["delta_bias"]}
        return kk.selective_scan(A=A, **one, **rest).square().sum()

    samples = {name: i[name] for name in names}
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(i["A"], samples)
    for n in range(2):
        A = i["A"].clone().requires_grad_()
        (true,) = torch.autograd.grad(loss(A, {k: x[n] for k, x in samples.items()}), A)
        torch.testing.assert_close(found[n], true)


def test_forward_mode_is_refused() -> None:
    i = make(Case(L=4)).tensors
    u = i.pop("u")
    with pytest.raises(RuntimeError, match=r"forward mode|jvp"):
        torch.func.jvp(lambda x: kk.selective_scan(x, **i), (u,), (u,))


def test_checkpointing_recomputes_the_same_bits() -> None:
    i = {k: x.requires_grad_() for k, x in make(Case()).tensors.items()}

    def scan(*values: Tensor) -> Tensor:
        return kk.selective_scan(**dict(zip(i, values, strict=True)))

    plain = torch.autograd.grad(scan(*i.values()).sum(), tuple(i.values()))
    again = torch.utils.checkpoint.checkpoint(scan, *i.values(), use_reentrant=False)
    for x, y in zip(plain, torch.autograd.grad(again.sum(), tuple(i.values())), strict=True):
        assert torch.equal(x, y)
