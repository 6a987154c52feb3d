"""Decoding over a cache that is shared out among processes: each decodes its part, then merge."""

from pathlib import Path

import torch
from torch import Tensor, distributed

import kexue_kernels as kk
from tests.mla.cases import Case, Inputs, make, run

CASE = Case((37, 5, 20, 0), Tq=2, H=3, block_size=4)
RANKS = 2


def part(inputs: Inputs, rank: int) -> Inputs:
    """A rank's pages, in a cache of its own: the last rank's hold the queries' tokens too."""
    size = CASE.block_size
    before = (inputs.cache_seqlens - CASE.Tq).clamp_min(0) // (RANKS * size)  # pages of rank 0
    lengths = inputs.cache_seqlens - before * size if rank else before * size
    rows = zip(inputs.block_table, before.tolist(), strict=True)
    table = torch.stack([row.roll(-pages * rank) for row, pages in rows])
    mine = sorted({
        int(page)
        for row, length in zip(table, lengths.tolist(), strict=True)
        for page in row[: -(-length // size)]
    })  # fmt: skip
    local = torch.full((inputs.kv_cache.shape[0],), -1, dtype=torch.int32)
    local[mine] = torch.arange(len(mine), dtype=torch.int32)
    held = local[table.clamp_max(len(local) - 1).long()]
    return Inputs(inputs.q, inputs.kv_cache[mine], held, lengths)


def decode(inputs: Inputs, rank: int) -> tuple[Tensor, Tensor]:
    """Every rank's answer: its own part's, gathered and merged in order."""
    out, lse = kk.mla_decode(
        inputs.q, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens,
        head_dim_v=CASE.dc, softmax_scale=CASE.scale, causal=rank == RANKS - 1, return_lse=True,
    )  # fmt: skip
    outs, lses = ([torch.empty_like(x) for _ in range(RANKS)] for x in (out, lse))
    distributed.all_gather(outs, out)
    distributed.all_gather(lses, lse)
    state = outs[0], lses[0]
    for other in zip(outs[1:], lses[1:], strict=True):
        state = kk.merge_attention_states(*state, *other)
    return state


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS
    )
    torch.save(decode(part(make(CASE), rank), rank), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_are_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=RANKS)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    whole = run(CASE, make(CASE), "auto")
    torch.testing.assert_close(first, (whole["out"], whole["lse"]))


def test_a_page_is_one_rank_s() -> None:
    inputs = make(CASE)
    parts = [part(inputs, rank) for rank in range(RANKS)]
    assert [x.cache_seqlens.tolist() for x in parts] == [[16, 0, 8, 0], [21, 5, 12, 0]]
    used = -(-inputs.cache_seqlens // CASE.block_size)
    assert sum(x.kv_cache.shape[0] for x in parts) == used.sum()
