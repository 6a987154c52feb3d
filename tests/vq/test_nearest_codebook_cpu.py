"""nearest_codebook's C++ kernels: every instruction set, threads and blocks, strides, bad luck."""

import functools
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kexue_kernels.vq import cpu_nearest_codebook
from tests import cpu
from tests.vq.cases import DTYPES, EVERY_KIND, METRICS, SHAPES, Data, nearest

cpu.extension()


def search(x: Tensor, codebook: Tensor, metric: str = "l2", precision: str = "exact") -> Tensor:
    """x [N, d], codebook [K, d] -> [N]."""
    return cpu_nearest_codebook.search(x[None], codebook[None], metric, precision)[0]


@functools.cache
def expected(case: Data, metric: str) -> Tensor:
    return nearest(*case.make(), metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", EVERY_KIND + SHAPES, ids=str)
def test_against_the_definition(case: Data, metric: str, isa: str, poisoned: None) -> None:
    assert torch.equal(search(*case.make(), metric), expected(case, metric))


# Sizes about those of panels, and pieces of 256 channels; several chunks of codes, which one
# thread shares with others or, where rows are few, has for itself.
SIZES = [
    Data("random", N=7, K=1000, d=3),
    Data("duplicated", N=1000, K=2, d=17),
    Data("integers", N=97, K=72, d=4),
    Data("random", N=33, K=13, d=300),
    Data("offset", N=16, K=6, d=256),
    Data("far", N=15, K=25, d=257),
    Data("random", N=70, K=4100, d=260),
    Data("random", N=5, K=1100, d=600, dtype=torch.float16),
    Data("bisector", N=300, K=60, d=40, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_sizes_and_threads(case: Data, threads: int, isa: str, keep_threads: None) -> None:
    torch.set_num_threads(threads)
    assert torch.equal(search(*case.make()), expected(case, "l2"))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_the_number_of_threads_changes_nothing(
    metric: str, precision: str, keep_threads: None
) -> None:
    for N, K in ((300, 1000), (9, 9000)):
        x, codebook = Data("clustered", N=N, K=K, d=64).make()
        found = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found += [search(x, codebook, metric, precision) for _ in range(2)]
        assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_heads(dtype: torch.dtype, isa: str) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(19, 40, 3, generator=g).to(dtype)[:, ::2].permute(2, 1, 0)  # [H, N, d]
    codebook = torch.randn(3, 50, 38, generator=g).to(dtype)[..., ::2]
    found = cpu_nearest_codebook.search(x, codebook, "l2", "exact")
    for h in range(3):
        assert torch.equal(found[h], nearest(x[h], codebook[h], "l2"))
    one = cpu_nearest_codebook.search(x[:1, :1].expand(3, 20, 19), codebook, "dot", "exact")
    assert torch.equal(one[2], nearest(x[0, :1], codebook[2], "dot").expand(20))


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_but_ties(metric: str, isa: str) -> None:
    """No row can be certified: all of them are rechecked, and the first of equals wins."""
    x, codebook = Data("random", N=200, K=300, d=40).make()
    same = codebook[:1].expand(300, 40)
    assert torch.equal(search(x, same, metric), torch.zeros(200, dtype=torch.int64))
    same = same.clone()
    same[:5] = torch.nan
    assert torch.equal(search(x, same, metric), torch.full((200,), 5))
    hardly = codebook[:1] + torch.linspace(0, 3e-6, 300)[:, None]
    assert torch.equal(search(x, hardly, metric), nearest(x, hardly, metric))


@pytest.mark.parametrize("metric", METRICS)
def test_one_bit_apart(metric: str, isa: str) -> None:
    """Codes next to each other in the last bit of one channel, at rows that tell them apart."""
    x, codebook = Data("random", N=100, K=50, d=30).make()
    above = codebook.clone()
    above[:, 7] = torch.nextafter(above[:, 7], torch.tensor(torch.inf))
    both = torch.cat([above, codebook])
    assert torch.equal(search(x, both, metric), nearest(x, both, metric))


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-19, 1e19, 1e30])
def test_any_scale(scale: float, isa: str) -> None:
    """Subnormal numbers; squares that are; squares past the largest float32."""
    x, codebook = Data("clustered", N=50, K=40, d=9).make()
    for far in (1.0, 1e3):
        rows = x * scale
        rows[::2] *= far
        codes = codebook * scale
        codes[::3] *= far
        for metric in METRICS:
            assert torch.equal(search(rows, codes, metric), nearest(rows, codes, metric))


def test_flushed_denormals(isa: str) -> None:
    x, codebook = Data("random", N=40, K=60, d=9).make()
    x, codebook = x * 1e-22, codebook * 1e-22
    exact = nearest(x, codebook, "l2")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor always keeps them")
    try:
        assert torch.equal(search(x, codebook), exact)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("metric", METRICS)
def test_fast_finds_codes_that_are_as_near(metric: str, isa: str) -> None:
    x, codebook = Data("random", N=200, K=300, d=64).make()
    found, best = (
        codebook[i].double()
        for i in (search(x, codebook, metric, "fast"), nearest(x, codebook, metric))
    )
    if metric == "l2":
        loss = (x - found).square().sum(-1) - (x - best).square().sum(-1)
    else:
        by = [c / c.norm(dim=-1, keepdim=True) if metric == "cosine" else c for c in (best, found)]
        loss = (x * by[0]).sum(-1) - (x * by[1]).sum(-1)
    assert loss.abs().max() < 1e-3


def peak_kib() -> int:
    """The most memory that this process has had at once, since it was last asked to forget."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_beside_the_inputs() -> None:
    """20000 rows, 20000 codes: the matrix of distances would be 1.6 GB."""
    x, codebook = torch.randn(2, 20000, 8)
    search(x[:1000], codebook)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_kib()
    search(x, codebook)
    assert peak_kib() - before < 16 << 10
