"""The Triton kernels of the mla family on a GPU: real sizes, graphs, large caches."""

import pytest
import torch
from torch import Tensor

import kexue_kernels as kk
from tests.mla.cases import Case, check, make, run
from tests.mla.test_mla_cache_append import make as appended

pytestmark = pytest.mark.gpu

REAL_SIZES = [
    *(Case((4097, 1, 8192, 64), Tq=Tq, H=16, dc=512, dr=64, block_size=64, dtype=torch.bfloat16)
      for Tq in (1, 4)),
    Case((4097, 0, 3000), H=128, dc=512, dr=64, block_size=64, dtype=torch.bfloat16),
    Case((777, 5000), Tq=2, H=20, dc=256, dr=32, block_size=16, dtype=torch.float16),
    Case((2500,), H=5, dc=512, dr=64, block_size=1, dtype=torch.float32),
    Case((65536,), H=16, dc=512, dr=64, block_size=64, dtype=torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize("case", REAL_SIZES, ids=str)
def test_real_sizes(case: Case) -> None:
    check(case, "triton", device="cuda")


def test_graph_replay_with_changed_contents() -> None:
    case = Case((900, 40, 0), H=16, dc=512, dr=64, block_size=64, dtype=torch.bfloat16)
    inputs = make(case, device="cuda")
    run(case, inputs, "triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(case, inputs, "triton")
    for lengths in ((10, 40, 0), (900, 1, 0)):
        inputs.q.normal_()
        inputs.cache_seqlens.copy_(torch.tensor(lengths))
        graph.replay()
        again = run(case, inputs, "triton")
        assert all(torch.equal(x, again[name]) for name, x in captured.items())


def test_wrong_lengths_and_ids_read_nothing_outside() -> None:
    case = Case((40, 17), dc=64, dr=16, block_size=16, dtype=torch.bfloat16)
    inputs = make(case, device="cuda")
    inputs.kv_cache.nan_to_num_()
    inputs.cache_seqlens.copy_(torch.tensor([10**9, -5]))
    inputs.block_table.fill_(10**9)
    found = run(case, inputs, "triton")
    assert found["out"].isfinite().all()
    assert torch.equal(found["lse"][1].cpu(), torch.full((3, 1), -torch.inf))


def test_offsets_past_two_to_the_31() -> None:
    width, block_size = 576, 64
    num_blocks = 2**31 // (width * block_size) + 10
    cache = torch.zeros(num_blocks, block_size, width, dtype=torch.bfloat16, device="cuda")
    assert cache.numel() > 2**31
    rows = torch.randn(block_size, width, device="cuda").bfloat16()
    slots = torch.arange(block_size, device="cuda") + (num_blocks - 1) * block_size
    kk.mla_cache_append(rows[:, :512], rows[:, 512:], cache, slots, backend="triton")
    assert torch.equal(cache[-1], rows)
    q = torch.randn(1, 1, 16, width, device="cuda").bfloat16()
    lengths = torch.tensor([block_size], dtype=torch.int32, device="cuda")

    def decode(pages: Tensor, block: int) -> Tensor:
        table = torch.tensor([[block]], dtype=torch.int32, device="cuda")
        out = kk.mla_decode(
            q, pages, table, lengths, head_dim_v=512, softmax_scale=0.1, backend="triton"
        )
        assert isinstance(out, Tensor)
        return out

    assert torch.equal(decode(cache, num_blocks - 1), decode(cache[-1:].clone(), 0))


@pytest.mark.parametrize("interleaved", [False, True])
def test_appending_as_on_cpu(interleaved: bool) -> None:
    given = appended(torch.float32)
    moved = {name: x.cuda() for name, x in given.items()}
    for each in (given, moved):
        kk.mla_cache_append(**each, rope_interleaved=interleaved)
    torch.testing.assert_close(moved["kv_cache"].cpu(), given["kv_cache"])


def test_a_slot_outside_is_skipped() -> None:
    given = {name: x.cuda() for name, x in appended(torch.float32).items()}
    given["slot_mapping"].fill_(10**6)
    before = given["kv_cache"].clone()
    kk.mla_cache_append(**given, backend="triton")
    assert torch.equal(given["kv_cache"], before)
