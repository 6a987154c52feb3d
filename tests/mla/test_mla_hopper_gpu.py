"""mla_decode's Hopper kernel on a Hopper GPU: real sizes, graphs, large caches, beside Triton's."""

import pytest
import torch
from torch import Tensor

import kexue_kernels as kk
from tests.mla.cases import Case, check, make, run
from tests.mla.test_mla_hopper import CASES, case

pytestmark = pytest.mark.gpu

REAL_SIZES = [
    *(case(4097, 1, 8192, 64, H=64, Tq=Tq, num_splits=None) for Tq in (1, 2, 3, 4)),
    case(4097, 0, 3000, H=128, num_splits=None),
    case(4097, 5, 3000, H=128, Tq=2, num_splits=None, dtype=torch.float16),
    case(1000, 2, H=128, Tq=4, causal=False, num_splits=None),
    case(777, 5000, H=33, Tq=2, block_size=16, num_splits=None, dtype=torch.float16),
    case(2501, H=70, block_size=1, num_splits=None),
    case(2501, H=100, block_size=24, num_splits=3),
    case(65536, H=128, num_splits=None),
    case(*range(1, 301), H=64),  # more thread blocks than are under way at once
]


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Hopper path needs compute capability 9.0")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES + REAL_SIZES, ids=str)
def test_real_sizes(case: Case) -> None:
    check(case, "cuda", device="cuda")


@pytest.mark.parametrize("case", REAL_SIZES[:6], ids=str)
def test_as_triton(case: Case) -> None:
    inputs = make(case, device="cuda")
    found, triton = (run(case, inputs, backend) for backend in ("cuda", "triton"))
    torch.testing.assert_close(found["lse"], triton["lse"], atol=1e-5, rtol=1e-6)
    eps = torch.finfo(case.dtype).eps
    torch.testing.assert_close(found["out"], triton["out"], atol=4 * eps, rtol=4 * eps)


def test_the_same_every_time() -> None:
    inputs = make(several := case(*[3000] * 40, H=128, num_splits=2), device="cuda")
    first = run(several, inputs, "cuda")
    for _ in range(20):
        assert all(torch.equal(x, first[name]) for name, x in run(several, inputs, "cuda").items())


def test_graph_replay_with_changed_contents() -> None:
    several = case(900, 40, 0, H=128, num_splits=None)
    inputs = make(several, device="cuda")
    inputs.kv_cache.nan_to_num_()  # lengths change
    run(several, inputs, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(several, inputs, "cuda")
    for lengths in ((10, 40, 0), (900, 1, 0)):
        inputs.q.normal_()
        inputs.cache_seqlens.copy_(torch.tensor(lengths))
        graph.replay()
        again = run(several, inputs, "cuda")
        assert all(torch.equal(x, again[name]) for name, x in captured.items())


def test_wrong_lengths_and_ids_read_nothing_outside() -> None:
    inputs = make(wrong := case(40, 17), device="cuda")
    inputs.kv_cache.nan_to_num_()
    inputs.cache_seqlens.copy_(torch.tensor([10**9, -5]))
    inputs.block_table.fill_(10**9)
    found = run(wrong, inputs, "cuda")
    assert found["out"].isfinite().all()
    assert torch.equal(found["lse"][1].cpu(), torch.full((64, 1), -torch.inf))


def test_offsets_past_two_to_the_31() -> None:
    width, block_size = 576, 64
    num_blocks = 2**31 // (width * block_size) + 10
    cache = torch.zeros(num_blocks, block_size, width, dtype=torch.bfloat16, device="cuda")
    assert cache.numel() > 2**31
    cache[-1] = torch.randn(block_size, width, device="cuda")
    q = torch.randn(1, 1, 64, width, device="cuda").bfloat16()
    lengths = torch.tensor([block_size], dtype=torch.int32, device="cuda")

    def decode(pages: Tensor, block: int) -> Tensor:
        table = torch.tensor([[block]], dtype=torch.int32, device="cuda")
        out = kk.mla_decode(
            q, pages, table, lengths, head_dim_v=512, softmax_scale=0.1, backend="cuda"
        )
        assert isinstance(out, Tensor)
        return out

    assert torch.equal(decode(cache, num_blocks - 1), decode(cache[-1:].clone(), 0))
