"""mla_attention in C++: instruction sets, threads, tiles, groups of heads, strides."""

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kexue_kernels import launchers
from kexue_kernels.mla import blocked_mla_attention as blocked
from tests import cpu
from tests.mla.attention_cases import CASES, NAMES, Case, check, make, packed, plain, run, scale_of
from tests.mla.cases import HALVES, error

cpu.extension()

from kexue_kernels.mla import cpu_mla_attention as native  # noqa: E402

DTYPES = (torch.float32, *HALVES)


def test_it_serves_cpu() -> None:
    for backend in ("auto", "cpu"):
        served = launchers.launcher(
            "mla", "mla_attention", backend, torch.device("cpu"), torch.float32
        )
        assert served is native


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case: Case, isa: str, poisoned: None) -> None:
    check(case, "cpu")


# Sizes about those of registers, tiles of rows and columns, blocks of queries and of keys.
SIZES = [
    *(Case(1, T, 2, 7, 3, 5, 9) for T in (2, 15, 16, 17, 33, 64, 65, 130)),
    *(Case(1, T, 1, 6, 2, 6, 8, causal=False) for T in (16, 70, 129)),
    Case(1, 70, 2, 128, 64, 128, 64),
    Case(2, 40, 3, 16, 0, 32, 300),  # sums of many terms
    Case(1, 20, 2, 300, 30, 270, 40),
    Case(1, 66, 1, 1, 1, 1, 1),
    Case(1, 66, 5, 17, 33, 31, 47),
    packed(1, 64, 0, 65, 3, H=2, dk=8, dr=4, dv=9, dc=10),
    packed(100, 30, H=2, dk=8, dr=4, dv=9, dc=10, causal=False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_sizes(case: Case, dtype: torch.dtype, isa: str, poisoned: None) -> None:
    check(replace(case, dtype=dtype), "cpu")


@pytest.mark.parametrize("case", [Case(T=1), packed(*[1] * 40, H=2, dk=5, dr=2, dv=3)], ids=str)
def test_one_key_has_no_gradient(case: Case, isa: str, poisoned: None) -> None:
    """Exactly: D comes from the same numbers, in the same order, as what it is taken from."""
    check(case, "cpu")
    found = run(case, make(case), "cpu")
    for name in ("q_nope", "q_rope", "k_rope", "w_uk"):
        assert torch.equal(found[name], torch.zeros_like(found[name]))


@settings(max_examples=25, deadline=None)
@given(
    case=st.builds(
        Case,
        B=st.integers(1, 2),
        T=st.integers(1, 150),
        H=st.integers(1, 5),
        dk=st.integers(1, 40),
        dr=st.integers(0, 20),
        dv=st.integers(1, 40),
        dc=st.integers(1, 50),
        dtype=st.sampled_from(DTYPES),
        causal=st.booleans(),
        strided=st.booleans(),
        scale=st.none() | st.floats(-2, 2),
    )
)
def test_any_legal_shape_against_blocked(case: Case) -> None:
    """The same formulas: at most twice its error, plus rounding, wherever luck strikes."""
    inputs = make(case)
    exact = plain(case, {name: x.double() for name, x in inputs.items()})
    pairs = zip(results(case, inputs, native), results(case, inputs, blocked), strict=True)
    for (name, found), (_, other) in pairs:
        if name == "lse":
            torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-5)
            continue
        scale = exact[name].abs().max().item() if found.numel() else 0.0
        allowed = 2 * error(other.double(), exact[name]) + 4 * torch.finfo(found.dtype).eps * scale
        assert error(found.double(), exact[name]) <= allowed, name


def results(
    case: Case, inputs: dict[str, Tensor], launcher: ModuleType
) -> list[tuple[str, Tensor]]:
    """A launcher alone: out, lse and the six gradients."""
    options = scale_of(case), case.causal, case.cu_seqlens()
    data = [inputs[name] for name in NAMES]
    out, lse = launcher.forward(*data, *options)
    grads = launcher.backward(inputs["grad"], *data, out, lse, *options, (True,) * 6)
    return [("out", out), ("lse", lse), *zip(NAMES, grads, strict=True)]


THREADED = [
    Case(1, 400, 3, 40, 16, 24, 300),
    Case(2, 200, 5, 16, 8, 16, 40, causal=False, dtype=torch.bfloat16),
    packed(150, 0, 1, 249, H=2, dk=33, dr=0, dv=17, dc=30, dtype=torch.float16),
]


@pytest.mark.parametrize("case", THREADED, ids=str)
def test_the_number_of_threads_changes_nothing(
    case: Case, keep_threads: None, poisoned: None
) -> None:
    inputs = make(case)
    torch.set_num_threads(1)
    alone = results(case, inputs, native)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for (name, x), (_, y) in zip(results(case, inputs, native), alone, strict=True):
            assert torch.equal(x, y), name
    check(case, "cpu")


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("case", [Case(H=5), packed(9, 0, 60, H=5, dtype=torch.bfloat16)], ids=str)
def test_groups_of_heads(
    case: Case, heads: int, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "BUDGET", heads * 4 * case.T * (case.dk + case.dv))
    check(case, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_change_nothing(dtype: torch.dtype, isa: str) -> None:
    case = Case(2, 80, 3, 20, 12, 18, 40, dtype=dtype)
    expected = run(case, make(case), "cpu")
    spread = replace(case, strided=True)
    for name, x in run(spread, make(spread), "cpu").items():
        assert torch.equal(x, expected[name]), name


def test_what_is_never_multiplied() -> None:
    """A query is as it would be alone, whatever its sequence holds after it, as blocks go."""
    case = Case(1, 200, 2)
    inputs = make(case)
    expected = run(case, inputs, "cpu")["out"]
    for name in ("kv_latent", "k_rope"):
        inputs[name][:, 128:] = torch.nan
    found = run(case, inputs, "cpu")["out"]
    assert torch.equal(found[:, :128], expected[:, :128])
    assert found[:, 128:].isnan().all()


@pytest.mark.parametrize("factor", [1e3, -1e3, torch.inf])
def test_scores_of_any_size(factor: float, isa: str) -> None:
    """Not finite where the reference's are not."""
    case = Case(1, 70, 2, scale=1.0)
    inputs = make(case)
    inputs["q_nope"] *= factor
    found = run(case, inputs, "cpu")["out"]
    own = run(case, inputs, "reference")["out"]
    assert torch.equal(found.isfinite(), own.isfinite())
    if abs(factor) < 1e4:
        torch.testing.assert_close(found, own, rtol=1e-2, atol=1e-3)
