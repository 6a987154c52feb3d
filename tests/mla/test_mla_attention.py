"""mla_attention: the reference against its definition, the blocked path against float64."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import kexue_kernels as kk
from kexue_kernels import launchers
from kexue_kernels.mla import attention_operators
from kexue_kernels.mla import blocked_mla_attention as blocked
from kexue_kernels.mla.groups import BUDGET, heads_per_group
from tests.mla.attention_cases import (
    CASES,
    NAMES,
    Case,
    attend,
    check,
    make,
    packed,
    plain,
    run,
    scale_of,
)
from tests.mla.cases import error

SMALL = [
    Case(2, 4, 2, 3, 2, 4, 5),
    Case(1, 4, 2, 3, 0, 4, 5, causal=False, scale=0.7),
    packed(2, 0, 3, H=2, dk=3, dr=2, dv=4, dc=6),
    packed(4, 1, H=1, dk=3, dr=2, dv=4, dc=6, causal=False),
]


def doubles(case: Case) -> dict[str, Tensor]:
    return {name: x.double() for name, x in make(case).items()}


def defined(case: Case, inputs: dict[str, Tensor]) -> Tensor:
    """Token by token and head by head."""
    q_nope, q_rope, latent, k_rope, w_uk, w_uv = (inputs[name] for name in NAMES)
    out = torch.zeros(case.B, case.T, case.H, case.dv, dtype=torch.float64)
    bounds = (case.cu_seqlens().tolist()) if case.lengths else [0, case.T]
    for first, last in pairwise(bounds):
        for b in range(case.B):
            for h in range(case.H):
                for i in range(first, last):
                    tokens = range(first, i + 1 if case.causal else last)
                    scores = [
                        scale_of(case)
                        * float(
                            q_nope[b, i, h] @ (w_uk[h] @ latent[b, j])
                            + q_rope[b, i, h] @ k_rope[b, j]
                        )
                        for j in tokens
                    ]
                    total = sum(map(math.exp, scores))
                    for j, score in zip(tokens, scores, strict=True):
                        out[b, i, h] += math.exp(score) / total * (w_uv[h] @ latent[b, j])
    return out


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_reference_is_the_definition(case: Case) -> None:
    inputs = doubles(case)
    data = tuple(inputs[name] for name in NAMES)
    torch.testing.assert_close(attend(case, data, "reference"), defined(case, inputs))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_reference_s_gradients(case: Case) -> None:
    data = tuple(doubles(case)[name].requires_grad_() for name in NAMES)

    def function(*data: Tensor) -> Tensor:
        return attend(case, data)  # doubles go to the reference

    assert torch.autograd.gradcheck(function, data)
    assert torch.autograd.gradgradcheck(function, data, fast_mode=True)


@pytest.fixture(params=["installed", "blocked"])
def cpu(request: pytest.FixtureRequest) -> str:
    """Backend "cpu" as it is here, and in plain PyTorch."""
    if request.param == "blocked":
        request.getfixturevalue("without_extension")
    return "cpu"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_cpu(case: Case, cpu: str, poisoned: None) -> None:
    check(case, cpu)


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(causal=False, dtype=torch.bfloat16),
        Case(1, 30, 5, dr=0),
        packed(9, 0, 30, 1),
        packed(21, 16, causal=False),
    ],
    ids=str,
)
@pytest.mark.parametrize(("block", "keys"), [(8, 8), (8, 20), (16, 12)])
def test_many_tiles_and_groups(
    case: Case,
    block: int,
    keys: int,
    without_extension: None,
    poisoned: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tiles that the diagonal crosses in every way, and a last group with fewer heads."""
    monkeypatch.setattr(blocked, "BLOCK", block)
    monkeypatch.setattr(blocked, "KEYS", keys)
    monkeypatch.setattr(blocked, "BUDGET", 2 * 4 * case.T * (case.dk + case.dv))
    check(case, "cpu")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_each_gradient_alone(backend: str, cpu: str) -> None:
    inputs = make(Case())
    together = run(Case(), inputs, backend)
    for name in NAMES:
        data = tuple(inputs[each].detach().requires_grad_(each == name) for each in NAMES)
        attend(Case(), data, backend).backward(inputs["grad"])
        grads = {each: x.grad for each, x in zip(NAMES, data, strict=True)}
        assert torch.equal(grads.pop(name), together[name])
        assert set(grads.values()) == {None}


def test_large_scores_neither_overflow_nor_vanish(cpu: str) -> None:
    """The backward knows a row's sum as its logarithm: off by a rounding of that."""
    case = Case(scale=40.0)
    inputs = make(case)
    exact = plain(case, {name: x.double() for name, x in inputs.items()})
    own, found = plain(case, inputs), run(case, inputs, cpu)
    data = tuple(inputs[name] for name in NAMES)
    _, lse = attention_operators.mla_attention(*data, None, 40.0, True, cpu)
    assert lse.max() > 500  # exp ends at 88
    roundings = 4 + lse.abs().max().item()
    for name, x in found.items():
        scale = (4 if name == "out" else roundings) * exact[name].abs().max().item()
        allowed = 2 * error(own[name].double(), exact[name]) + scale * torch.finfo(x.dtype).eps
        assert error(x.double(), exact[name]) <= allowed, name


def test_a_token_s_future_and_its_neighbours_are_not_read(cpu: str) -> None:
    """Neither later tokens nor other sequences, whatever they hold."""
    case = packed(10, 12)
    inputs = make(case)
    before = run(case, inputs, cpu)["out"]
    for name in ("kv_latent", "k_rope"):
        inputs[name] = inputs[name].clone()
        inputs[name][:, 5:10] = 1e4
        inputs[name][:, 20:] = 1e4
    after = run(case, inputs, cpu)["out"]
    untouched = [*range(5), *range(10, 20)]
    assert torch.equal(after[:, untouched], before[:, untouched])
    assert not torch.equal(after, before)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_sequences_are_attended_one_by_one(dtype: torch.dtype) -> None:
    case = packed(9, 0, 28)
    data = [make(case)[name] for name in NAMES]
    found = kk.mla_attention(*data, cu_seqlens=torch.tensor([0, 9, 9, 37], dtype=dtype))
    parts = [
        kk.mla_attention(*(x[:, first:last] for x in data[:4]), *data[4:])
        for first, last in ((0, 9), (9, 37))
    ]
    torch.testing.assert_close(found, torch.cat(parts, 1))


EMPTY = [{"B": 0}, {"T": 0}, {"H": 0}, {"dk": 0}, {"dk": 0, "dr": 0}, {"dv": 0}, {"dc": 0}]


@pytest.mark.parametrize("sizes", EMPTY, ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_without_elements(sizes: dict[str, int], backend: str) -> None:
    case = Case(**sizes)
    inputs = make(case)
    found = run(case, inputs, backend)
    assert found["out"].shape == (case.B, case.T, case.H, case.dv)
    assert all(found[name].shape == inputs[name].shape for name in NAMES)
    assert all(x.isfinite().all() for x in found.values())


def test_no_tokens_in_no_sequence() -> None:
    data = [make(Case(1, 0))[name] for name in NAMES]
    assert kk.mla_attention(*data, cu_seqlens=torch.tensor([0])).shape == (1, 0, 3, 10)
    assert kk.mla_attention(*data, cu_seqlens=torch.tensor([0, 0, 0])).shape == (1, 0, 3, 10)


def test_what_is_computed_where_nothing_is_compiled(without_extension: None) -> None:
    module = launchers.launcher("mla", "mla_attention", "auto", torch.device("cpu"), torch.float32)
    assert module is blocked


def test_no_scores_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory grows with T: no tensor has as many elements as T * T."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            if isinstance(found, Tensor):
                largest = max(largest, found.numel())
            return found

    monkeypatch.setattr(blocked, "KEYS", 64)
    monkeypatch.setattr(blocked, "BLOCK", 32)
    monkeypatch.setattr(blocked, "BUDGET", 1)
    case = Case(1, 300, 4, 4, 4, 4, 8)
    inputs = [make(case)[name] for name in NAMES]
    with Watch():
        out, lse = blocked.forward(*inputs, 0.3, True, None)
        blocked.backward(out, *inputs, out, lse, 0.3, True, None, (True,) * 6)
    assert 0 < largest < 300 * 300


# ---- groups of heads


@pytest.mark.parametrize(
    ("tokens", "H", "expected"),
    [
        (8192, 128, 32),  # 4 MiB a head
        (65536, 128, 4),
        (1024, 16, 16),  # all of them
        (2**24, 128, 1),  # over the budget, but less can't be
        (8192, 40, 20),  # two equal groups, not 32 and 8
        (8192, 33, 17),
        (0, 5, 5),
        (8192, 1, 1),
    ],
)
def test_heads_of_a_group(tokens: int, H: int, expected: int) -> None:
    assert heads_per_group(tokens, H, 128, 128, 2) == expected


def test_groups_fit_their_budget() -> None:
    for tokens in (1, 100, 4097, 70_000):
        for H in (1, 7, 16, 128):
            for budget in (1, 10**6, BUDGET):
                size = heads_per_group(tokens, H, 128, 64, 2, budget)
                head = tokens * (128 + 64) * 2
                assert 1 <= size <= H
                assert size == 1 or size * head <= budget
                more = -(-H // size) - 1  # one group less would not fit
                assert more == 0 or -(-H // more) * head > budget
