"""The layer that takes a DynamicLayer's place in a cache: like it, but in rows with room."""

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import kexue_kernels as kk

transformers = pytest.importorskip("transformers")

from kexue_kernels.integrations import latent_cache  # noqa: E402
from kexue_kernels.integrations.latent_cache import PAGE, LatentLayer  # noqa: E402

DC, DR = 6, 3


def drawn(B: int, T: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, 1, T, DC, generator=generator), torch.randn(
        B, 1, T, DR, generator=generator
    )


def caches(*lengths: int, B: int = 2):
    """A DynamicCache with an adopted layer, and one as it was, with the same in them."""
    ours, theirs = transformers.DynamicCache(), transformers.DynamicCache()
    with torch.no_grad():
        for seed, length in enumerate(lengths):
            latent_cache.adopt(ours, 0)
            for cache in (ours, theirs):
                held = cache.update(*drawn(B, length, seed), 0)
    assert isinstance(ours.layers[0], LatentLayer)
    assert type(theirs.layers[0]) is transformers.DynamicLayer
    return ours, theirs, held


def check_same(ours, theirs) -> None:
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.get_mask_sizes(2, 0) == theirs.get_mask_sizes(2, 0)
    assert ours.get_max_length() == theirs.get_max_length()
    for name in ("keys", "values"):
        got, expected = (getattr(cache.layers[0], name) for cache in (ours, theirs))
        assert got is None if expected is None else torch.equal(got, expected)


def test_growing():
    ours, theirs, _ = caches(3, 1, 1, 700, 1)
    check_same(ours, theirs)
    layer = ours.layers[0]
    rows = layer.rows
    with torch.no_grad():
        for seed in range(5):
            ours.update(*drawn(2, 1, seed), 0)
    assert layer.rows is rows  # there was room
    assert layer.rows.shape[1] % PAGE == 0


@pytest.mark.parametrize("filled", [False, True])
def test_a_filled_layer_is_adopted(filled: bool):
    cache, other = transformers.DynamicCache(), transformers.DynamicCache()
    for each in (cache, other):
        each.update(*drawn(2, 4), 0)
    if not filled:
        cache.layers[0].reset()
        other.layers[0].reset()
    layer = cache.layers[0]
    with torch.no_grad():
        latent_cache.adopt(cache, 0)
    assert cache.layers[0] is layer
    assert isinstance(layer, LatentLayer)
    check_same(cache, other)


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-2),
        lambda cache: cache.crop(0),
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        lambda cache: cache.batch_repeat_interleave(3),
        lambda cache: cache.reset(),
    ],
    ids=["crop", "no crop", "reorder", "select", "repeat", "reset"],
)
def test_changes(change):
    ours, theirs, _ = caches(3, 2)
    for cache in (ours, theirs):
        change(cache)
    check_same(ours, theirs)
    B = theirs.layers[0].keys.shape[0] if theirs.get_seq_length() else 2
    with torch.no_grad():
        for cache in (ours, theirs):
            cache.update(*drawn(B, 2, 7), 0)
    check_same(ours, theirs)


@pytest.mark.parametrize(("given", "left"), [(-1, 4), (-9, 0), (0, 5), (2, 2), (9, 5)])
def test_crop(given: int, left: int):
    """Also as in versions in which a positive number was what to keep."""
    ours, _, held = caches(3, 2)
    ours.crop(given)
    assert ours.get_seq_length() == left
    assert torch.equal(ours.layers[0].keys, held[0][:, :, :left])


def test_copies_are_apart():
    ours, theirs, _ = caches(3)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        check_same(other, theirs)
        with torch.no_grad():
            other.update(*drawn(2, 1), 0)
        check_same(ours, theirs)


def test_with_gradients_it_is_what_it_was():
    ours, theirs, _ = caches(3)
    latents, keys = (x.requires_grad_() for x in drawn(2, 2, 5))
    for cache in (ours, theirs):
        held = cache.update(latents, keys, 0)
        (held[0].sum() + held[1].sum()).backward()
    assert type(ours.layers[0]) is transformers.DynamicLayer
    check_same(ours, theirs)
    assert_close(latents.grad, torch.full_like(latents, 2.0))


def test_other_caches_are_left_alone():
    class Own(transformers.DynamicCache):
        def update(self, *given, **options):
            return super().update(*given, **options)

    config = transformers.DeepseekV3Config(num_hidden_layers=1)
    for cache in (Own(), transformers.StaticCache(config, max_cache_len=8)):
        cache.update(*drawn(2, 3), 0)
        kind = type(cache.layers[0])
        latent_cache.adopt(cache, 0)
        assert type(cache.layers[0]) is kind


@pytest.mark.parametrize("adopted", [True, False])
@pytest.mark.parametrize("starts", [None, (0, 3), (70, 64)])
def test_pages(adopted: bool, starts: tuple[int, ...] | None):
    """mla_decode over them is attention over each sequence's rows from its start on."""
    ours, theirs, held = caches(100, 29)
    end = 129
    cache = ours if adopted else theirs
    if adopted:
        ours.layers[0].rows[:, end:] = torch.nan
    pages, table = latent_cache.pages(cache, 0, held, end, starts)
    assert pages.shape[1:] == (PAGE, DC + DR)
    q = torch.randn(2, 1, 4, DC + DR, generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([end - start for start in starts or (0, 0)], dtype=torch.int32)
    got = kk.mla_decode(q, pages, table, lengths, head_dim_v=DC, softmax_scale=0.5)
    for b, start in enumerate(starts or (0, 0)):
        rows = torch.cat(held, -1)[b, 0, start:]
        weights = torch.softmax(q[b, 0] @ rows.T * 0.5, -1)
        assert_close(got[b, 0], weights @ rows[:, :DC])
    if adopted:
        assert ours.layers[0].pages(starts)[1] is table  # not made again
