"""linear_scan's Triton kernel: in the interpreter with tiny tiles, and on a GPU at real sizes."""

import threading
import time
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import kexue_kernels as kk
from kexue_kernels.scan import blocked_linear_scan, triton_linear_scan
from kexue_kernels.scan.triton_chained_scan import await_runs, compose_runs, new_chain
from kexue_kernels.scan.triton_linear_scan import Config, configure
from kexue_kernels.triton_common import pack
from tests.scan.cases import ALL, Case, Inputs, check, error, make, packed, run

# Tiles of 4 steps, and spans of 2 groups of 2 chunks: 17 steps cross every kind of border.
SERIAL = Config(RUN=2, RUNS=2, BLOCK_D=4, num_warps=1, chained=False)
CHAINED = SERIAL._replace(chained=True, WINDOW=2)
FORCED = [
    Case(D=6),
    Case(D=6, dtype=torch.bfloat16, reverse=True),
    Case(D=3, dtype=torch.float16),
    Case(D=3, dtype=torch.complex64, reverse=True),
    Case(D=3, a="channel", initial=None),
    Case(B=1, D=4, dtype=torch.bfloat16, a="invariant", reverse=True),
    Case(D=3, dtype=torch.complex64, a="channel"),
    Case(D=2, a="step"),
    Case(D=4, a="batch", strided=True),
    Case(B=1, L=1, D=1),
    packed((3, 0, 9, 1, 0), D=3),
    packed((3, 0, 9, 1, 0), D=4, dtype=torch.bfloat16, a="channel", reverse=True),
    packed((0, 13, 4), D=2, dtype=torch.complex64, reverse=True),
    packed((0, 13, 4), D=2, dtype=torch.complex64, a="channel", initial=None),
]


def force(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    monkeypatch.setattr(triton_linear_scan, "configure_interpreted", lambda *_: config)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_case(case: Case, poisoned: None) -> None:
    check(case, "triton")


@pytest.mark.parametrize("case", FORCED, ids=str)
@pytest.mark.parametrize("config", [SERIAL, CHAINED], ids=["serial", "chained"])
def test_tiny_tiles(
    case: Case, config: Config, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, config)
    check(case, "triton")


def test_a_chain_of_many_spans(poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, CHAINED._replace(BLOCK_D=1))
    check(Case(B=1, L=100, D=1), "triton")


def test_a_nan_of_any_payload_passes_through_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """All bits set is also what marks a word that has not been published."""
    force(monkeypatch, CHAINED)
    nan = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    b = torch.zeros(1, 17, 2)
    b[0, 0, 0] = nan
    h = kk.linear_scan(nan.expand(1, 17, 2), b, backend="triton")
    assert h.isnan().all()


@triton.jit
def _compose_kernel(chain_ptr, out_ptr, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)[None, :].to(tl.int64)
    rows = tl.arange(0, ROWS)[:, None]
    a, b = await_runs(chain_ptr, rows, rows > 0, columns, D, False)
    a, b = compose_runs(a, b, ROWS)
    tl.store(out_ptr + columns, pack(a, tl.float32), mask=columns < D)
    tl.store(out_ptr + D + columns, pack(b, tl.float32), mask=columns < D)


def test_a_chunk_waits_for_what_it_wants() -> None:
    """Rows published one by one from another thread; row 0, not wanted, never is."""
    chain = new_chain(4, 1, 3, 2, torch.device("cpu"))
    out = torch.full((2, 3), torch.nan)
    a, b = torch.rand(2, 4, 3)
    waiting = threading.Thread(target=lambda: _compose_kernel[(1,)](chain, out, 3, 4, 4))
    waiting.start()
    for row in (3, 1, 2):
        time.sleep(0.02)
        assert out.isnan().all()
        chain[1 + row] = torch.stack([a[row], b[row]], -1).view(torch.int64)[:, 0]
    waiting.join()
    torch.testing.assert_close(out[0], a[1:].prod(0))
    torch.testing.assert_close(out[1], (b[1] * a[2] + b[2]) * a[3] + b[3])


@pytest.mark.parametrize("window", [2, 8])
@pytest.mark.parametrize("chunks", [(1,), (0, 5, 64, 1, 0), (65, 64, 63), (3,) * 40])
def test_every_row_of_the_chain_has_one_owner(chunks: tuple[int, ...], window: int) -> None:
    """`enter_chunk`'s arithmetic: rows of chunks, groups and spans, packed as `_place` does."""
    size, start, taken = 10, 0, []
    total = sum(chunks) * size // size + len(chunks)
    for n, count in enumerate(chunks):
        row = start // size + n
        group = row // window + n
        span = group // window + n
        groups, spans = -(-count // window), -(-count // window**2)
        taken += [("chunk", row + i) for i in range(max(count, 1))]
        taken += [("group", group + i) for i in range(groups)]
        taken += [("span", span + i) for i in range(spans)]
        start += count * size
    assert len(set(taken)) == len(taken)
    groups = total // window + len(chunks)
    room = {"chunk": total, "group": groups, "span": groups // window + len(chunks)}
    assert all(at < room[level] for level, at in taken)
    assert new_chain(total, len(chunks), 2, window, torch.device("cpu")).shape[0] == 1 + sum(
        room.values()
    )


def test_pairs_are_read_where_halves_are_whole_words() -> None:
    x = torch.zeros(2, 6, 8, dtype=torch.bfloat16)
    assert triton_linear_scan._pairs(x)
    assert triton_linear_scan._pairs(x[:, :, 2:6])
    assert triton_linear_scan._pairs(x[:1, :1].expand(2, 6, 8))
    assert not triton_linear_scan._pairs(x[:, :, 1:7])
    assert not triton_linear_scan._pairs(x[:, :, :7])
    assert not triton_linear_scan._pairs(x[:, :, ::2])
    assert not triton_linear_scan._pairs(x.mT)
    assert not triton_linear_scan._pairs(x.flatten()[1:25].view(2, 6, 2))


def rule(
    sequences: int,
    L: int,
    D: int,
    dtype: torch.dtype = torch.float32,
    paired: bool = False,
    reads: int = 2,
    packed: bool = False,
    sms: int = 132,
) -> Config:
    return configure(sequences, L, D, dtype, paired, reads, packed, sms)


def test_the_rule_for_tiles() -> None:
    """Rows of 64 bytes, 128 threads with 16 bytes of each step."""
    bf16, c64 = torch.bfloat16, torch.complex64
    assert rule(8, 16384, 1536)[:4] == (8, 32, 16, 4)
    assert rule(8, 16384, 1536, bf16, paired=True)[:4] == (8, 32, 32, 4)
    assert rule(8, 16384, 1536, bf16)[:4] == (4, 32, 32, 4)
    assert rule(8, 16384, 1536, c64)[:4] == (8, 32, 8, 4)
    assert rule(8, 16384, 1536, reads=1).BLOCK_L == 512
    assert rule(1, 10**6, 1)[:3] == (8, 128, 1)
    assert rule(4, 1, 64).RUN == 1
    assert rule(4, 65, 64).RUN == 4
    assert rule(100, 6400, 64, packed=True).RUN == 2


def test_the_rule_for_chains() -> None:
    """Chained where whole sequences would leave the device idle, unless they are short."""
    assert rule(1, 1_048_576, 64).chained
    assert rule(8, 16384, 1536).chained
    assert not rule(8, 1024, 1536).chained
    assert not rule(64, 16384, 1536).chained
    assert rule(64, 16384, 1536, packed=True).chained
    assert not rule(8, 16384, 1536, sms=16).chained


def test_lengths_do_not_enter_the_compile_key() -> None:
    """Nor does the number of sequences: the rule gives a handful of tiles, powers of two."""
    lengths = [1, 2, 40, 100, 129, 1000, 4096, 4097, 10**5, 10**7]
    found = {rule(n, L, 512)._replace(chained=False) for n in (1, 3, 64) for L in lengths}
    assert len(found) == 4
    every = triton_linear_scan.linear_scan_kernel
    assert {"L", "sequences", "total_rows"} <= set(every.arg_names)
