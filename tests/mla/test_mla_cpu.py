"""mla_decode and mla_cache_append in C++: instruction sets, threads, tiles, strides."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kexue_kernels import reference
from tests import cpu
from tests.mla.cases import CASES, HALVES, Case, Inputs, check, error, make, run

cpu.extension()

from kexue_kernels.mla import cpu_mla_cache_append, cpu_mla_decode  # noqa: E402

DTYPES = (torch.float32, *HALVES)


def decode(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The launcher alone."""
    return cpu_mla_decode.forward(
        inputs.q, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens,
        case.head_dim_v or case.dc, case.scale, case.causal, case.num_splits,
    )  # fmt: skip


# ---- mla_decode


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case: Case, isa: str, poisoned: None) -> None:
    check(case, "cpu")


# Sizes about those of registers, tiles and panels of queries, blocks of rows, parts of sequences.
SIZES = [
    *(Case((n, 47, 48, 0), H=16) for n in (6, 49, 59, 97)),
    *(Case((100,), H=H) for H in (1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 65)),
    *(Case((60, 13), H=5, Tq=Tq) for Tq in (2, 7, 20)),
    Case((500, 30), H=16, dc=64, dr=16, block_size=64),
    Case((700,), H=40, dc=33, dr=9, block_size=100, Tq=2),
    Case((20,), H=4, dc=97, dr=0, head_dim_v=97),  # rows that end where a register doesn't
    Case((20,), H=4, dc=130, dr=400, head_dim_v=529),
    Case((55,), H=12, dc=512, dr=64, block_size=64),
    Case((4096,), H=16, dc=512, dr=64, block_size=64),  # sums of many channels
    Case((20, 9), H=1, dc=1, dr=0, block_size=1),
    Case((600, 300), H=20, Tq=3, num_splits=1),
    Case((600, 300), H=20, Tq=3, num_splits=7, causal=False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_sizes(case: Case, dtype: torch.dtype, isa: str) -> None:
    check(replace(case, dtype=dtype), "cpu")


@settings(max_examples=40, deadline=None)
@given(
    case=st.builds(
        Case,
        lengths=st.lists(st.integers(0, 100), min_size=1, max_size=4).map(tuple),
        Tq=st.integers(1, 5),
        H=st.integers(1, 40),
        dc=st.integers(1, 70),
        dr=st.integers(0, 20),
        block_size=st.integers(1, 70),
        dtype=st.sampled_from(DTYPES),
        causal=st.booleans(),
        num_splits=st.none() | st.integers(1, 3),
        shared=st.booleans(),
        strided=st.booleans(),
    )
)
def test_any_legal_shape(case: Case) -> None:
    check(case, "cpu")


THREADED = [
    Case((900, 3, 0, 1500), H=16, dc=64, dr=16, block_size=64),  # sequences of several parts
    Case((900, 700), H=20, Tq=5, block_size=16),  # several tiles of queries
    Case((40,) * 30, H=16, dtype=torch.bfloat16),
    Case((2000,), H=4, num_splits=3, dtype=torch.float16),
]


@pytest.mark.parametrize("case", THREADED, ids=str)
def test_the_number_of_threads_changes_nothing(
    case: Case, keep_threads: None, poisoned: None
) -> None:
    inputs = make(case)
    found = []
    for threads in (1, 2, 5, 16, 2):
        torch.set_num_threads(threads)
        found.append(decode(case, inputs))
    for out, lse in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(lse, found[0][1])
    check(case, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_change_nothing(dtype: torch.dtype, isa: str) -> None:
    case = Case((150, 20), Tq=2, H=9, dc=40, dr=8, block_size=32, dtype=dtype)
    inputs = make(case)
    expected = decode(case, inputs)
    for laid_out in (turned, spread, padded):
        strided = inputs.with_data(laid_out(inputs.q), laid_out(inputs.kv_cache))
        for x, y in zip(decode(case, strided), expected, strict=True):
            assert torch.equal(x, y), laid_out.__name__
    one = inputs.with_data(inputs.q[:, :1, :1].expand_as(inputs.q), inputs.kv_cache)
    many = inputs.with_data(one.q.contiguous(), inputs.kv_cache)
    assert torch.equal(decode(case, one)[0], decode(case, many)[0])


def turned(x: Tensor) -> Tensor:
    """The same numbers, the last axis slowest."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def spread(x: Tensor) -> Tensor:
    """The same numbers, every other one in memory."""
    return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


def padded(x: Tensor) -> Tensor:
    """The same numbers with others at the ends of the last axis."""
    return torch.nn.functional.pad(x, (3, 2), value=torch.nan)[..., 3:-2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("H", [3, 16])
def test_later_rows_never_reach_a_query(H: int, dtype: torch.dtype, isa: str) -> None:
    """A query is as it would be alone, whatever the tokens after it left in the cache."""
    case = Case((70,), Tq=6, H=H, dtype=dtype)
    inputs = make(case)
    expected, lse = decode(case, inputs)
    page = inputs.block_table[0, 66 // case.block_size]
    inputs.kv_cache[page, 66 % case.block_size] = torch.nan  # query 2's own, unseen by 0 and 1
    found, found_lse = decode(case, inputs)
    assert torch.equal(found[:, :2], expected[:, :2])
    assert torch.equal(found_lse[..., :2], lse[..., :2])
    assert found[:, 2:].isnan().all()


@pytest.mark.parametrize("factor", [1e3, -1e3, 3e38])
def test_scores_of_any_size(factor: float, isa: str) -> None:
    """Where they overflow, the same results are finite."""
    case = Case((60, 200), H=9, num_splits=2)
    inputs = make(case)
    inputs.q.mul_(factor).nan_to_num_(posinf=3e38, neginf=-3e38)
    out, lse = decode(case, inputs)
    expected, expected_lse = reference.mla_decode(
        inputs.q, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens,
        head_dim_v=case.dc, softmax_scale=case.scale, return_lse=True,
    )  # fmt: skip
    assert torch.equal(out.isfinite(), expected.isfinite())
    if abs(factor) < 1e4:
        torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=0)


def test_lazy_negation() -> None:
    case = Case()
    inputs = make(case)
    lazy = inputs.with_data(torch._neg_view(-inputs.q), inputs.kv_cache)
    assert lazy.q.is_neg()
    found = run(case, lazy, "cpu")
    for x, y in zip(found.values(), decode(case, inputs), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(("length", "page"), [(17, 0), (-1, 0), (9, 4), (9, -1)])
def test_out_of_reach(length: int, page: int) -> None:
    """The launcher looks for itself: nothing outside the cache is read."""
    table = torch.tensor([[1, page]], dtype=torch.int32)
    lengths = torch.tensor([length], dtype=torch.int32)
    q, pages = torch.ones(1, 1, 2, 6), torch.ones(4, 8, 6)
    with pytest.raises(ValueError, match=r"cache_seqlens: expected|block_table: expected"):
        cpu_mla_decode.forward(q, pages, table, lengths, 4, 1.0, True, None)


# ---- mla_cache_append


def tokens(
    T: int, dc: int, dr: int, dtype: torch.dtype, wide: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The tensors of a call; weight and angles in `wide`."""
    g = torch.Generator().manual_seed(0)
    angles = torch.rand(T, dr // 2, generator=g) * 6
    slots = torch.randperm(T + 9, generator=g)[:T]
    slots[T // 2] = -1
    return {
        "kv_latent": torch.randn(T, dc, generator=g).to(dtype),
        "k_rope": torch.randn(T, dr, generator=g).to(dtype),
        "slot_mapping": slots,
        "norm_weight": torch.randn(dc, generator=g).to(wide),
        "cos": angles.cos().to(wide),
        "sin": angles.sin().to(wide),
    }


def appended(given: dict[str, Tensor], interleaved: bool, block_size: int = 7) -> Tensor:
    """The cache, which was 7 everywhere, after the launcher's call."""
    x = given["kv_latent"]
    width = x.shape[1] + given["k_rope"].shape[1]
    blocks = -(-(given["slot_mapping"].shape[0] + 9) // block_size)
    cache = torch.full((blocks, block_size, width), 7.0, dtype=x.dtype)
    append(given, cache, interleaved)
    return cache


def append(given: dict[str, Tensor], cache: Tensor, interleaved: bool = False) -> None:
    cpu_mla_cache_append.append(
        given["kv_latent"], given["k_rope"], cache, given["slot_mapping"],
        given.get("norm_weight"), 1e-6, given.get("cos"), given.get("sin"), interleaved,
    )  # fmt: skip


def from_reference(given: dict[str, Tensor], like: Tensor, interleaved: bool) -> Tensor:
    cache = torch.full_like(like, 7.0, dtype=given["kv_latent"].dtype)
    reference.mla_cache_append(
        given["kv_latent"], given["k_rope"], cache, given["slot_mapping"],
        norm_weight=given.get("norm_weight"), cos=given.get("cos"), sin=given.get("sin"),
        rope_interleaved=interleaved,
    )  # fmt: skip
    return cache


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("dc", "dr"), [(1, 2), (7, 6), (16, 0), (33, 34), (512, 64), (257, 300), (300, 514)]
)
def test_rows(dc: int, dr: int, dtype: torch.dtype, interleaved: bool, isa: str) -> None:
    for wide in {torch.float32, dtype}:
        given = tokens(11, dc, dr, dtype, wide)
        found = appended(given, interleaved)
        own = from_reference(given, found, interleaved)
        double = {k: v if k == "slot_mapping" else v.double() for k, v in given.items()}
        exact = from_reference(double, found, interleaved)
        scale = exact.abs().max().item()
        allowed = 2 * error(own, exact) + 2 * torch.finfo(torch.float32).eps * scale
        assert error(found, exact) <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("left_out", [("norm_weight",), ("cos", "sin"), ("norm_weight", "cos")])
def test_parts_of_a_row(left_out: tuple[str, ...], dtype: torch.dtype, isa: str) -> None:
    given = tokens(9, 21, 10, dtype)
    whole = appended(given, False)
    copied = torch.full_like(whole, 7.0)
    slots = given["slot_mapping"]
    rows = torch.cat([given["kv_latent"], given["k_rope"]], -1)
    copied.view(-1, 31)[slots[slots >= 0]] = rows[slots >= 0]
    fewer = {k: v for k, v in given.items() if k not in (*left_out, "sin" * ("cos" in left_out))}
    found = appended(fewer, False)
    latent = copied if "norm_weight" in left_out else whole
    key = copied if "cos" in left_out else whole
    assert torch.equal(found[..., :21], latent[..., :21])
    assert torch.equal(found[..., 21:], key[..., 21:])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_of_rows_change_nothing(dtype: torch.dtype, interleaved: bool, isa: str) -> None:
    given = tokens(9, 40, 18, dtype)
    expected = appended(given, interleaved)
    for laid_out in (turned, spread, padded):
        strided = {k: v if k == "slot_mapping" else laid_out(v) for k, v in given.items()}
        assert torch.equal(appended(strided, interleaved), expected), laid_out.__name__
        cache = laid_out(torch.full_like(expected, 7.0))
        append(strided, cache, interleaved)
        assert torch.equal(cache, expected), laid_out.__name__


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_of_tokens_with_one_slot_the_last_stays(threads: int, keep_threads: None) -> None:
    T = 4000
    given = tokens(T, 40, 8, torch.float32)
    given["slot_mapping"] = torch.randint(0, 50, (T,), generator=torch.Generator().manual_seed(1))
    torch.set_num_threads(threads)
    found = appended(given, True).view(-1, 48)
    last = {slot: t for t, slot in enumerate(given["slot_mapping"].tolist())}
    alone = {k: v[list(last.values())] if k != "norm_weight" else v for k, v in given.items()}
    expected = torch.full_like(found, 7.0)
    append(alone, expected[:, None], True)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("slot", [12, -2])
def test_a_slot_outside(slot: int) -> None:
    given = tokens(3, 4, 2, torch.float32)
    given["slot_mapping"] = torch.tensor([1, slot, 3])
    cache = torch.full((3, 4, 6), 7.0)
    with pytest.raises(ValueError, match="slot_mapping: expected slots from 0 to 11"):
        append(given, cache)
    assert torch.equal(cache, torch.full_like(cache, 7.0))
