"""mla_decode and its kin: the reference against the definition, and the CPU path against it."""

import itertools

import pytest
import torch
from torch import Tensor

import kexue_kernels as kk
from tests.mla.cases import CASES, Case, check, make, run


def definition(case: Case, b: int, t: int, h: int) -> tuple[Tensor, Tensor]:
    """out [dv] and lse of one query, key by key."""
    inputs = make(case)
    length = case.lengths[b]
    last = length - case.Tq + t if case.causal else length - 1
    keys = []
    for j in range(last + 1):
        block = inputs.block_table[b, j // case.block_size]
        keys.append(inputs.kv_cache[block, j % case.block_size].double())
    dv = case.head_dim_v or case.dc
    if not keys:
        return torch.zeros(dv).double(), torch.tensor(-torch.inf)
    scores = torch.stack([case.scale * (inputs.q[b, t, h].double() @ key) for key in keys])
    weights = scores.softmax(0)
    out = sum(w * key[:dv] for w, key in zip(weights, keys, strict=True))
    assert isinstance(out, Tensor)
    return out, scores.exp().sum().log()


@pytest.mark.parametrize(
    "case", [Case(), Case((5, 11, 2, 0), Tq=4), Case((6,), Tq=2, causal=False)]
)
def test_reference_is_the_definition(case: Case) -> None:
    inputs = make(case)
    found = run(case, inputs.with_data(inputs.q.double(), inputs.kv_cache.double()), "reference")
    for b, t, h in itertools.product(*map(range, (len(case.lengths), case.Tq, case.H))):
        out, lse = definition(case, b, t, h)
        torch.testing.assert_close(found["out"][b, t, h], out)
        torch.testing.assert_close(found["lse"][b, h, t], lse.double())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu(case: Case) -> None:
    check(case, "cpu")


@pytest.mark.parametrize("case", [Case((3000, 17), dc=64, dr=8, block_size=16)], ids=str)
@pytest.mark.usefixtures("without_extension")
def test_blocked_pytorch_in_several_chunks(case: Case) -> None:
    check(case, "cpu")


def test_four_tokens_are_four_steps() -> None:
    case = Case((37, 20), Tq=4)
    inputs = make(case)
    whole = run(case, inputs, "cpu")
    for t in range(4):
        step = kk.mla_decode(
            inputs.q[:, t : t + 1], inputs.kv_cache, inputs.block_table,
            inputs.cache_seqlens - 3 + t, head_dim_v=case.dc, softmax_scale=case.scale,
        )  # fmt: skip
        torch.testing.assert_close(whole["out"][:, t : t + 1], step)


def test_absorbed_is_expanded() -> None:
    """q_nope W_uk against latents is q_nope against the keys of all heads, W_uk latents."""
    H, dk, dv, case = 2, 6, 5, Case((9, 4), H=2)
    g = torch.Generator().manual_seed(1)
    inputs = make(case)
    w_uk, w_uv = (torch.randn(H, n, case.dc, generator=g) for n in (dk, dv))
    q_nope = torch.randn(2, 1, H, dk, generator=g)
    absorbed = torch.einsum("bthk,hkc->bthc", q_nope, w_uk)
    q = torch.cat([absorbed, inputs.q[..., case.dc :]], -1)
    latent = run(case, inputs.with_data(q, inputs.kv_cache), "cpu")["out"]
    out = torch.einsum("bthc,hvc->bthv", latent, w_uv)
    for b, length in enumerate(case.lengths):
        blocks = inputs.block_table[b, : -(-length // case.block_size)].long()
        rows = inputs.kv_cache[blocks].flatten(0, 1)[:length]
        k_nope = torch.einsum("nc,hkc->hnk", rows[:, : case.dc], w_uk)
        v = torch.einsum("nc,hvc->hnv", rows[:, : case.dc], w_uv)
        k = torch.cat([k_nope, rows[:, case.dc :].expand(H, -1, -1)], -1)
        query = torch.cat([q_nope[b, 0], inputs.q[b, 0, :, case.dc :]], -1)[:, None]
        expanded = torch.nn.functional.scaled_dot_product_attention(query, k, v, scale=case.scale)
        torch.testing.assert_close(out[b, 0], expanded[:, 0], rtol=1e-4, atol=1e-5)


def test_the_cache_may_have_one_head() -> None:
    case = Case()
    inputs = make(case)
    with_head = inputs.with_data(inputs.q, inputs.kv_cache.unsqueeze(2))
    assert torch.equal(run(case, inputs, "cpu")["out"], run(case, with_head, "cpu")["out"])


@pytest.mark.parametrize("shape", [(0, 1, 3), (2, 0, 3), (2, 1, 0)])
def test_zero_sizes(shape: tuple[int, int, int]) -> None:
    B, Tq, H = shape
    out, lse = kk.mla_decode(
        torch.ones(B, Tq, H, 6), torch.ones(4, 2, 6), torch.zeros(B, 3, dtype=torch.int32),
        torch.ones(B, dtype=torch.int32), head_dim_v=4, softmax_scale=1.0, return_lse=True,
    )  # fmt: skip
    assert out.shape == (B, Tq, H, 4)
    assert lse.shape == (B, H, Tq)


def test_a_cache_without_blocks() -> None:
    out, lse = kk.mla_decode(
        torch.ones(2, 1, 3, 6), torch.ones(0, 2, 6), torch.zeros(2, 0, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32), head_dim_v=4, softmax_scale=1.0, return_lse=True,
    )  # fmt: skip
    assert torch.equal(out, torch.zeros(2, 1, 3, 4))
    assert torch.equal(lse, torch.full((2, 3, 1), -torch.inf))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_states_are_those_of_all_keys(dtype: torch.dtype) -> None:
    case = Case((24, 40, 8), dtype=dtype, block_size=8)
    inputs = make(case)
    whole = run(case, inputs, "reference")
    half = inputs.cache_seqlens // 16 * 8
    pairs = zip(inputs.block_table, half.tolist(), strict=True)
    later = torch.stack([row.roll(-(length // 8)) for row, length in pairs])
    first, second = (
        kk.mla_decode(
            inputs.q, inputs.kv_cache, table.contiguous(), lengths, head_dim_v=case.dc,
            softmax_scale=case.scale, causal=False, return_lse=True,
        )
        for table, lengths in (
            (inputs.block_table, half),
            (later, inputs.cache_seqlens - half),
        )
    )  # fmt: skip
    out, lse = kk.merge_attention_states(*first, *second)
    tight = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(out, whole["out"], **tight)
    torch.testing.assert_close(lse, whole["lse"])


def test_merging_with_nothing_and_its_gradient() -> None:
    g = torch.Generator().manual_seed(0)
    out_a, out_b = (torch.randn(2, 3, 1, 4, generator=g).double().requires_grad_() for _ in "ab")
    lse_a, lse_b = (torch.randn(2, 1, 3, generator=g).double().requires_grad_() for _ in "ab")
    assert torch.autograd.gradcheck(kk.merge_attention_states, (out_a, lse_a, out_b, lse_b))
    none = torch.full_like(lse_a, -torch.inf)
    out, lse = kk.merge_attention_states(out_a, lse_a, out_b, none)
    assert torch.equal(out, out_a)
    torch.testing.assert_close(lse, lse_a)
    out, lse = kk.merge_attention_states(out_a, none, out_b, none)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, none)
    grads = torch.autograd.grad(out.sum(), (out_a, out_b))
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


def test_no_keys_may_be_plus_infinity_as_in_flash_mla() -> None:
    g = torch.Generator().manual_seed(0)
    out_a, out_b = (torch.randn(2, 3, 1, 4, generator=g) for _ in "ab")
    lse_a, lse_b = (torch.randn(2, 1, 3, generator=g) for _ in "ab")
    lse_a[0], lse_b[:, :, 1] = -torch.inf, -torch.inf
    expected = kk.merge_attention_states(out_a, lse_a, out_b, lse_b)
    plus = (x.masked_fill(x == -torch.inf, torch.inf).requires_grad_() for x in (lse_a, lse_b))
    found = kk.merge_attention_states(out_a, next(plus), out_b, last := next(plus))
    assert all(map(torch.equal, found, expected))
    assert torch.autograd.grad(found[0].sum(), last)[0].isfinite().all()


def test_flash_mla_conventions() -> None:
    case = Case((5, 0, 20))
    inputs = make(case)
    arguments = inputs.q, inputs.kv_cache.unsqueeze(2), inputs.block_table, inputs.cache_seqlens
    out, lse = kk.flash_mla_with_kvcache(*arguments, case.dc, object(), object())
    expected = run(Case(case.lengths, causal=False), inputs, "reference")
    torch.testing.assert_close(out, expected["out"])
    assert torch.equal(lse[1], torch.full_like(lse[1], torch.inf))
    torch.testing.assert_close(lse[[0, 2]], expected["lse"][[0, 2]])
    same = kk.reference.flash_mla_with_kvcache(*arguments, case.dc)
    torch.testing.assert_close((out, lse), same)
