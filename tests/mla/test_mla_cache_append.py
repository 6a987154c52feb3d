"""mla_cache_append: rows at their slots, normalised and turned."""

import pytest
import torch
from torch import Tensor

import kexue_kernels as kk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(dtype: torch.dtype, T: int = 9, dc: int = 12, dr: int = 6) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    angles = torch.rand(T, dr // 2, generator=g) * 6
    slots = torch.randperm(20, generator=g)[:T]
    slots[2] = -1
    return {
        "kv_latent": torch.randn(T, dc, generator=g).to(dtype),
        "k_rope": torch.randn(T, dr, generator=g).to(dtype),
        "kv_cache": torch.full((5, 4, dc + dr), 7.0, dtype=dtype),
        "slot_mapping": slots,
        "norm_weight": torch.randn(dc, generator=g),
        "cos": angles.cos(),
        "sin": angles.sin(),
    }


def row_by_row(given: dict[str, Tensor], interleaved: bool) -> Tensor:
    """The cache in float64, by the formulas, token by token."""
    wide = {k: v if k == "slot_mapping" else v.double() for k, v in given.items()}
    cache = wide["kv_cache"].clone()
    dr = wide["k_rope"].shape[1]
    for t, slot in enumerate(given["slot_mapping"].tolist()):
        if slot == -1:
            continue
        x = wide["kv_latent"][t]
        latent = wide["norm_weight"] * x / torch.sqrt((x * x).mean() + 1e-6)
        key = torch.empty(dr, dtype=torch.float64)
        for i in range(dr // 2):
            first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + dr // 2)
            x1, x2 = wide["k_rope"][t, first], wide["k_rope"][t, second]
            c, s = wide["cos"][t, i], wide["sin"][t, i]
            key[first], key[second] = x1 * c - x2 * s, x2 * c + x1 * s
        cache[slot // 4, slot % 4] = torch.cat([latent, key])
    return cache


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_formulas(dtype: torch.dtype, interleaved: bool, backend: str) -> None:
    given = make(dtype)
    expected = row_by_row(given, interleaved)
    kk.mla_cache_append(**given, rope_interleaved=interleaved, backend=backend)
    torch.testing.assert_close(
        given["kv_cache"].double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6
    )
    assert given["slot_mapping"][2] == -1


def test_angles_may_come_twice() -> None:
    """cat(f, f), as Transformers gives them, in either layout."""
    for interleaved in (False, True):
        once, twice = make(torch.float32), make(torch.float32)
        for name in ("cos", "sin"):
            twice[name] = torch.cat([twice[name]] * 2, -1)
        for given in (once, twice):
            kk.mla_cache_append(**given, rope_interleaved=interleaved)
        assert torch.equal(once["kv_cache"], twice["kv_cache"])


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_without_options_rows_are_copied(backend: str) -> None:
    given = {
        k: v for k, v in make(torch.bfloat16).items() if k not in ("norm_weight", "cos", "sin")
    }
    before = given["kv_cache"].clone()
    given["kv_cache"] = given["kv_cache"].unsqueeze(2)
    kk.mla_cache_append(**given, backend=backend)
    rows = torch.cat([given["kv_latent"], given["k_rope"]], -1)
    found = given["kv_cache"].flatten(0, 2)
    for t, slot in enumerate(given["slot_mapping"].tolist()):
        if slot >= 0:
            assert torch.equal(found[slot], rows[t])
    untouched = torch.ones(20, dtype=torch.bool)
    untouched[given["slot_mapping"][given["slot_mapping"] >= 0]] = False
    assert torch.equal(found[untouched], before.flatten(0, 1)[untouched])


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_strided_cache(backend: str) -> None:
    plain, spread = make(torch.float32), make(torch.float32)
    wide = torch.full((5, 4, 36), 7.0)
    spread["kv_cache"] = wide[..., ::2]
    for given in (plain, spread):
        kk.mla_cache_append(**given, backend=backend)
    assert torch.equal(plain["kv_cache"], spread["kv_cache"])
    assert torch.equal(wide[..., 1::2], torch.full((5, 4, 18), 7.0))


@pytest.mark.parametrize("slot", [20, -2])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_slot_outside_raises_and_writes_nothing(slot: int, backend: str) -> None:
    given = make(torch.float32)
    given["slot_mapping"][4] = slot
    before = given["kv_cache"].clone()
    with pytest.raises(ValueError, match=rf"slot_mapping: expected slots from 0 to 19.*got {slot}"):
        kk.mla_cache_append(**given, backend=backend)
    assert torch.equal(given["kv_cache"], before)


def test_no_tokens() -> None:
    given = make(torch.float32, T=9)
    empty = {k: v[:0] if v.shape[0] == 9 else v for k, v in given.items()}
    before = given["kv_cache"].clone()
    kk.mla_cache_append(**empty)
    assert torch.equal(given["kv_cache"], before)
