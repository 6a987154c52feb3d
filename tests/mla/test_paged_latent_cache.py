"""PagedLatentCache: pages taken, shared, copied and given back."""

import random

import pytest
import torch
from torch import Tensor

import kexue_kernels as kk
from kexue_kernels.mla import fp8

DC, DR = 3, 2


def rows_of(cache: kk.nn.PagedLatentCache, seq_id: int) -> Tensor:
    """What mla_decode would read: [length, dc + dr]."""
    table, length = cache.block_table([seq_id]), int(cache.cache_seqlens([seq_id]))
    return kk.mla.reference.cached_rows(cache.kv_cache, table[0], length)


def some(T: int, start: float) -> tuple[Tensor, Tensor]:
    rows = start + torch.arange(T * (DC + DR), dtype=torch.float32).view(T, DC + DR)
    return rows[:, :DC], rows[:, DC:]


def test_append_and_decode() -> None:
    cache = kk.nn.PagedLatentCache(10, 4, DC, DR)
    first, second = cache.allocate(), cache.allocate()
    cache.append(first, *some(6, 0.0))
    cache.append(second, *some(3, 100.0))
    cache.append(first, *some(1, 50.0))
    expected = torch.cat([torch.cat(some(6, 0.0), -1), torch.cat(some(1, 50.0), -1)])
    assert torch.equal(rows_of(cache, first), expected)
    assert cache.cache_seqlens([second, first]).tolist() == [3, 7]
    assert cache.block_table([second, first]).dtype == torch.int32
    q = torch.randn(2, 1, 4, DC + DR)
    out = kk.mla_decode(
        q, cache.kv_cache, cache.block_table([first, second]), cache.cache_seqlens([first, second]),
        head_dim_v=DC, softmax_scale=0.1,
    )  # fmt: skip
    weights = (0.1 * q[0, 0] @ expected.T).softmax(-1)
    torch.testing.assert_close(out[0, 0], weights @ expected[:, :DC])


def test_a_fork_shares_until_it_writes() -> None:
    cache = kk.nn.PagedLatentCache(5, 4, DC, DR)
    parent = cache.allocate()
    cache.append(parent, *some(6, 0.0))
    child = cache.fork(parent)
    assert cache.free_blocks == 3
    assert torch.equal(cache.block_table([parent]), cache.block_table([child]))
    before = rows_of(cache, parent).clone()
    cache.append(child, *some(1, 9.0))
    assert cache.free_blocks == 2  # the last page was copied
    cache.append(parent, *some(1, -9.0))
    assert cache.free_blocks == 2  # and is the parent's own now
    assert torch.equal(rows_of(cache, parent)[:6], before)
    assert torch.equal(rows_of(cache, child)[:6], before)
    assert rows_of(cache, child)[6, 0] == 9
    assert rows_of(cache, parent)[6, 0] == -9
    cache.free(parent)
    assert cache.free_blocks == 3
    cache.free(child)
    assert cache.free_blocks == 5


def test_full_is_an_error_that_changes_nothing() -> None:
    cache = kk.nn.PagedLatentCache(2, 4, DC, DR)
    one = cache.allocate()
    cache.append(one, *some(5, 0.0))
    two = cache.fork(one)
    before, table = cache.kv_cache.clone(), cache.block_table([one, two])
    with pytest.raises(kk.CacheFullError, match="1 more pages are needed, 0 of 2 are free"):
        cache.append(two, *some(1, 0.0))
    with pytest.raises(RuntimeError, match="2 more pages"):
        cache.append(one, *some(4, 0.0))
    assert torch.equal(cache.kv_cache, before)
    assert torch.equal(cache.block_table([one, two]), table)
    assert cache.cache_seqlens([one, two]).tolist() == [5, 5]
    cache.free(two)
    cache.append(one, *some(3, 0.0))


def test_a_batch_of_forks_needs_one_page_less() -> None:
    """Both leave the shared page, so the last of them can keep it."""
    cache = kk.nn.PagedLatentCache(2, 4, DC, DR)
    one = cache.allocate()
    cache.append(one, *some(3, 0.0))
    batch = cache.select([one, cache.fork(one)])
    latent, key = some(2, 60.0)
    batch.append(latent.view(2, 1, DC), key.view(2, 1, DR))
    assert cache.free_blocks == 0
    assert batch.cache_seqlens().tolist() == [4, 4]
    assert [rows_of(cache, seq_id)[3, 0].item() for seq_id in batch.seq_ids] == [60, 65]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda c, s: c.append(s + 1, *some(1, 0.0)), ValueError, "seq_id: expected a sequence"),
        (lambda c, s: c.append("a", *some(1, 0.0)), TypeError, "seq_id: expected an int, got str"),
        (lambda c, s: c.append(s, torch.ones(2, 3), torch.ones(1, 2)), ValueError, "k_rope"),
        (lambda c, s: c.append(s, torch.ones(2, 4), torch.ones(2, 2)), ValueError, "kv_latent"),
        (lambda c, s: c.append(s, torch.ones(2, 3).half(), torch.ones(2, 2)), ValueError, "dtype"),
        (lambda c, s: c.select([s, s]), ValueError, "seq_ids: expected each sequence once"),
        (lambda c, s: c.reserve([s, s], 1), ValueError, "seq_ids: expected each sequence once"),
        (lambda c, s: c.reserve([s], -1), ValueError, "tokens: expected at least 0, got -1"),
        (lambda c, s: c.reserve([s], 1.5), TypeError, "tokens: expected an int, got float"),
        (lambda c, s: c.select([s]).append(*some(1, 0.0)), ValueError, "kv_latent: .*B, T, dc"),
        (
            lambda c, s: c.select([s]).append(torch.ones(1, 2, 3), torch.ones(1, 1, 2)),
            ValueError,
            r"k_rope: expected shape \[B, T, dr\] = \[1, 2, 2\], got \[1, 1, 2\]",
        ),
        (
            lambda c, s: kk.nn.PagedLatentCache(4, 4, 3, 2, dtype=torch.int32),
            ValueError,
            "dtype: expected a real floating dtype or float8_e4m3fn, got torch.int32",
        ),
        (lambda c, s: kk.nn.PagedLatentCache(0, 4, 3, 2), ValueError, "num_blocks"),
        (lambda c, s: kk.nn.PagedLatentCache(4, 1.5, 3, 2), TypeError, "block_size"),
        (
            lambda c, s: kk.nn.PagedLatentCache(4, 4, 3, 2, dtype=torch.float8_e4m3fn),
            ValueError,
            "dtype: expected dc a multiple of 128",
        ),
    ],
)
def test_bad_input(call: object, error: type[Exception], words: str) -> None:
    cache = kk.nn.PagedLatentCache(2, 4, DC, DR)
    seq_id = cache.allocate()
    with pytest.raises(error, match=words):
        call(cache, seq_id)  # type: ignore[operator]
    assert cache.length(seq_id) == 0
    assert cache.free_blocks == 2


def test_tokens_in_bytes() -> None:
    """Appended, shared, copied on write and read, as the bfloat16 that the bytes stand for."""
    rng = random.Random(0)
    cache = kk.nn.PagedLatentCache(9, 4, 128, 6, dtype=torch.float8_e4m3fn)
    assert cache.kv_cache.dtype == torch.uint8
    assert cache.kv_cache.shape == (9, 4, 128 + 4 + 12)
    assert cache.half().kv_cache.dtype == torch.uint8
    model: dict[int, list[Tensor]] = {cache.allocate(): []}
    full = 0
    for _ in range(300):
        seq_id = rng.choice(sorted(model))
        if rng.random() < 0.15 and len(model) < 4:
            model[cache.fork(seq_id)] = list(model[seq_id])
        elif rng.random() < 0.1 and len(model) > 1:
            cache.free(seq_id)
            del model[seq_id]
        else:
            tokens = torch.randn(1, rng.randrange(4), 134).bfloat16()
            try:
                cache.select([seq_id]).append(tokens[..., :128], tokens[..., 128:])
            except kk.CacheFullError:
                full += 1
                cache.free(seq_id)
                del model[seq_id]
                model[cache.allocate()] = []
            else:
                model[seq_id] += tokens[0].unbind()
        for each, expected in model.items():
            packed = [fp8.pack(token[:128], token[128:]) for token in expected]
            rows = torch.stack(packed) if packed else torch.empty(0, 144, dtype=torch.uint8)
            assert torch.equal(rows_of(cache, each), rows)
    assert full > 10
    batch = cache.select(sorted(model))
    q = torch.randn(len(model), 1, 3, 134).bfloat16()
    tables = batch.block_table(), batch.cache_seqlens()
    options = {"head_dim_v": 128, "softmax_scale": 0.1}
    out = kk.mla_decode(q, cache.kv_cache, *tables, **options)
    as_numbers = kk.mla_decode(q, fp8.unpack(cache.kv_cache, 128), *tables, **options)
    torch.testing.assert_close(out, as_numbers)


def test_ten_thousand_operations_against_a_dictionary() -> None:
    """Appends, forks, frees and batches, full caches included."""
    rng = random.Random(0)
    cache = kk.nn.PagedLatentCache(24, 4, DC, DR)
    model: dict[int, list[float]] = {}
    full = 0
    for number in range(10_000):
        action = rng.choice("aaaaafb-n")
        if action == "n" or not model:
            model[cache.allocate()] = []
            continue
        seq_id = rng.choice(sorted(model))
        if action == "f":
            model[cache.fork(seq_id)] = list(model[seq_id])
        elif action == "-":
            cache.free(seq_id)
            del model[seq_id]
        else:
            ids = [seq_id] if action == "a" else rng.sample(sorted(model), min(2, len(model)))
            T = rng.randrange(0, 6)
            values = torch.full((len(ids), T, DC + DR), float(number))
            batch = cache.select(ids)
            try:
                batch.append(values[..., :DC], values[..., DC:])
            except kk.CacheFullError:
                full += 1
            else:
                for each in ids:
                    model[each] += [float(number)] * T
        if number % 50 == 0:
            for each, expected in model.items():
                rows = rows_of(cache, each)
                assert rows.shape == (len(expected), DC + DR)
                assert torch.equal(rows, torch.tensor(expected)[:, None].expand_as(rows))
    assert full > 100
    for each in list(model):
        cache.free(each)
    assert cache.free_blocks == 24
