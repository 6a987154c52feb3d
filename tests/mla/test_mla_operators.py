"""The mla family as registered operators: opcheck, torch.compile, autocast, vmap."""

import pytest
import torch

import kexue_kernels as kk
from tests.mla.cases import Case, make, run
from tests.mla.test_mla_cache_append import make as appended

ops = torch.ops.kexue_kernels


def test_opcheck_decode() -> None:
    inputs = make(Case((5, 9), Tq=2))
    clean = inputs.kv_cache.nan_to_num()
    args = (inputs.q, clean, inputs.block_table, inputs.cache_seqlens, 20, 0.3, True, None, "cpu")
    torch.library.opcheck(ops.mla_decode.default, args)


def test_opcheck_append() -> None:
    given = appended(torch.float32)
    data = (given[name] for name in ("kv_latent", "k_rope", "kv_cache", "slot_mapping"))
    args = (*data, given["norm_weight"], 1e-6, given["cos"], given["sin"], True, "cpu")
    torch.library.opcheck(ops.mla_cache_append.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic: bool) -> None:
    """A generation step: append, then decode what was appended."""
    case = Case((5, 9), Tq=1)

    def step(q: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        kk.mla_cache_append(2 * q[:, 0, 0, :20], q[:, 0, 0, 20:], cache, slots)
        out = kk.mla_decode(
            q, cache, inputs.block_table, inputs.cache_seqlens, head_dim_v=20, softmax_scale=0.3
        )
        return out + 1

    inputs = make(case)
    slots = inputs.block_table[[0, 1], [0, 1]].long() * 8 + torch.tensor([4, 0])
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    mine, theirs = inputs.kv_cache.clone(), inputs.kv_cache.clone()
    torch.testing.assert_close(compiled(inputs.q, mine, slots), step(inputs.q, theirs, slots))
    assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())
    assert not torch.equal(mine.nan_to_num(), inputs.kv_cache.nan_to_num())


def test_autocast_takes_q_in_the_cache_s_dtype() -> None:
    case = Case(dtype=torch.bfloat16)
    inputs = make(case)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(case, inputs.with_data(inputs.q.float(), inputs.kv_cache), "auto")
    assert torch.equal(found["out"], run(case, inputs, "auto")["out"])


def test_vmap_maps_one_by_one() -> None:
    case = Case((5, 9), Tq=2)
    inputs = make(case)

    def decode(q: torch.Tensor) -> torch.Tensor:
        out = kk.mla_decode(
            q, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens,
            head_dim_v=20, softmax_scale=0.3,
        )  # fmt: skip
        assert isinstance(out, torch.Tensor)
        return out

    queries = torch.stack([inputs.q, 2 * inputs.q], 1)
    found = torch.func.vmap(decode, in_dims=1)(queries)
    assert torch.equal(found, torch.stack([decode(inputs.q), decode(2 * inputs.q)]))
