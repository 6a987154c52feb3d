"""nearest_codebook's Triton kernels: in the interpreter with few rows, and on a GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kexue_kernels import vq
from kexue_kernels.offline import pool
from kexue_kernels.offline import triton as offline
from kexue_kernels.vq import triton_nearest_codebook, triton_nearest_codebook_cases
from kexue_kernels.vq.triton_nearest_codebook import (
    Bounds,
    Config,
    Problem,
    _has_vectors,
    _Search,
    bounds,
    configure,
    search,
)
from tests.vq.cases import DTYPES, KINDS, METRICS, Data, check_nearest, nearest

SMALL = [Data(kind, N=12, K=9, d=5) for kind in KINDS]
SMALL += [
    Data(kind, N=12, K=9, d=5, dtype=dtype)
    for kind in ("offset", "bisector")
    for dtype in (torch.bfloat16, torch.float16)
]
SMALL += [Data("huge", N=9, K=7, d=5, dtype=torch.bfloat16)]
# About the sizes of tiles and blocks: 64 rows, codes and channels, 32 rows of a recheck.
SIZES = [
    Data("random", N=1, K=1, d=1),
    Data("duplicated", N=3, K=2, d=1),
    Data("integers", N=70, K=1, d=3),
    Data("random", N=1, K=300, d=17),
    Data("random", N=65, K=65, d=64),
    Data("bisector", N=10, K=128, d=70, dtype=torch.bfloat16),
    Data("integers", N=40, K=66, d=9, dtype=torch.float16),
    Data("duplicated", N=5, K=70, d=130),
]
CONFIG = Config(
    64, 64, 16, 1, 4, 1, SPLITS=1, BLOCK_R=16, BLOCK_E=16, programs=2
)  # of Triton's interpreter


def force(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    monkeypatch.setattr(
        triton_nearest_codebook, "configure_interpreted", lambda *_: CONFIG._replace(**options)
    )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_kind(case: Data, metric: str, poisoned: None) -> None:
    check_nearest(case, metric, "triton")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_every_size(case: Data, metric: str, poisoned: None) -> None:
    check_nearest(case, metric, "triton")


@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("kind", ["duplicated", "broken"])
def test_splits(kind: str, splits: int, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four splits of three tiles: the last one is empty."""
    force(monkeypatch, SPLITS=splits)
    check_nearest(Data(kind, N=18, K=140, d=9), "l2", "triton")


REST = [
    (1, "l2", Data("broken", N=35, K=9, d=11)),
    (2, "dot", Data("integers", N=18, K=9, d=3)),
    (5, "cosine", Data("duplicated", N=2, K=66, d=3)),
]


@pytest.mark.parametrize(("programs", "metric", "case"), REST, ids=str)
def test_every_row_rechecked(
    programs: int, metric: str, case: Data, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a bound all is compared in float64, by more or fewer programs than there is work."""
    force(monkeypatch, programs=programs)
    monkeypatch.setattr(triton_nearest_codebook, "bounds", lambda *_: Bounds(*[float("inf")] * 4))
    check_nearest(case, metric, "triton")


def test_too_many_channels_for_a_bound() -> None:
    assert bounds(1 << 17, "l2", torch.float32).eps == float("inf")
    assert bounds(1 << 16, "l2", torch.bfloat16).eps < 0.01


def uncertified(case: Data, metric: str, monkeypatch: pytest.MonkeyPatch) -> int:
    counts: list[int] = []
    monkeypatch.setattr(_Search, "recheck", lambda self, *_: counts.append(int(self.count[0])))
    x, codebook = case.make()
    search(x[None], codebook[None], metric, "exact")
    return counts[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_most_rows_are_certified(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for metric in METRICS:
        random = Data("random", N=64, K=200, d=64, dtype=dtype)
        assert uncertified(random, metric, monkeypatch) <= 3
    offset = Data("offset", N=64, K=200, d=64, dtype=dtype)
    assert uncertified(offset, "l2", monkeypatch) <= (3 if dtype == torch.float32 else 10)
    far = Data("far", N=64, K=200, d=8, dtype=dtype)  # one long code, whose tile is uncertain
    assert uncertified(far, "dot", monkeypatch) < 64


# ---- the bound


def true_scores(x: Tensor, codebook: Tensor, mean: Tensor | None, metric: str) -> Tensor:
    """What the kernel's scores are, in float64 [N, K]: a constant for each row beside the cost."""
    x, c = x.double(), codebook.double()
    if metric == "dot":
        return -x @ c.mT
    if metric == "cosine":
        return -x @ (c / c.norm(dim=-1, keepdim=True)).nan_to_num().mT
    assert mean is not None
    apart = c - mean.double()
    factor = apart if codebook.dtype == torch.float32 else c
    return apart.square().sum(-1) / 2 - (x - mean.double()) @ factor.mT


def check_bounds(case: Data, metric: str, device: str = "cpu") -> None:
    """The best score is not below its lower bound nor above its upper one, no other score below
    the second lower bound."""
    x, codebook = (t.to(device) for t in case.make())
    call = _Search(x[None], codebook[None], metric, exact=True)
    facts = call.describe_codes()
    lower, upper, second, index = (t[0] for t in call.search(facts) if t is not None)
    scores = true_scores(x, codebook, None if facts[0] is None else facts[0][0], metric)
    for split in range(index.shape[0]):
        size = -(-call.tiles // index.shape[0]) * call.config.BLOCK_K
        own = scores[:, split * size : (split + 1) * size].clone()
        at = (index[split] - split * size)[:, None]
        best = own.gather(1, at)[:, 0]
        assert (lower[split] <= best).all()
        assert (best <= upper[split]).all()
        others = own.scatter(1, at, torch.inf)
        assert (second[split] <= others.amin(1)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_bounds_hold(metric: str, dtype: torch.dtype) -> None:
    for kind in ("random", "offset", "clustered", "zeros"):
        check_bounds(Data(kind, N=20, K=70, d=40, dtype=dtype), metric)


# ---- the call


def test_heads_and_strides() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(19, 20, 3, generator=g)[:, ::2].permute(2, 1, 0)  # [H, N, d]
    codebook = torch.randn(3, 30, 38, generator=g)[..., ::2]
    for metric in METRICS:
        found = search(x, codebook, metric, "exact")
        for h in range(3):
            assert torch.equal(found[h], nearest(x[h], codebook[h], metric))
    one = search(x[:1, :1].expand(3, 5, 19), codebook.flip(1), "l2", "exact")
    assert torch.equal(one[2], nearest(x[0, :1], codebook[2].flip(0), "l2").expand(5))


def test_no_finite_code() -> None:
    codebook = torch.tensor([[torch.inf, 1], [1, torch.nan]])
    for precision in ("exact", "fast"):
        found = vq.nearest_codebook(
            torch.randn(3, 2), codebook, precision=precision, backend="triton"
        )
        assert found.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_fast_finds_codes_that_are_as_near(metric: str, dtype: torch.dtype) -> None:
    x, codebook = Data("random", N=40, K=150, d=30, dtype=dtype).make()
    found = search(x[None], codebook[None], metric, "fast")[0]
    scores = true_scores(x, codebook, torch.zeros(30), metric)
    loss = scores.gather(1, found[:, None])[:, 0] - scores.amin(1)
    assert loss.max() < 1e-3


@pytest.mark.parametrize("kind", ["broken", "huge", "zeros"])
@pytest.mark.parametrize("metric", METRICS)
def test_fast_tells_what_is_finite(kind: str, metric: str) -> None:
    x, codebook = Data(kind, N=20, K=12, d=5).make()
    found = search(x[None], codebook[None], metric, "fast")[0]
    assert torch.equal(found < 0, ~x.isfinite().all(1))
    assert codebook[found[found >= 0]].isfinite().all()


@pytest.mark.parametrize("metric", METRICS)
def test_fast_beside_a_code_that_float32_cannot_multiply(metric: str) -> None:
    """It must not make columns look near that belong to no code."""
    x = torch.tensor([[1.0, 0.1], [0.1, 1.0], [-1.0, -0.1], [-0.1, -1.0]])
    codebook = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3e38, 3e38]])
    for last in (codebook, -codebook):
        found = search(x[None], last[None], metric, "fast")[0]
        expected = search(x[None], last[None, :2], metric, "fast")[0]
        assert torch.equal(found, expected)


def test_memory_beside_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under 64 MB for 65536 rows and codes, and a constant and few words each for all sizes."""
    allocated = 0

    def new(_: _Search, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        nonlocal allocated
        tensor = torch.empty(shape, dtype=dtype, device="meta")
        allocated += tensor.nbytes
        return tensor

    class Launched:
        def __getitem__(self, grid: object) -> Any:
            return lambda *_, **__: None

    monkeypatch.setattr(_Search, "new", new)
    monkeypatch.setattr(
        triton_nearest_codebook, "configure_interpreted", lambda p, *_: configure(p, 132, 227 << 10)
    )
    for kernel in ("mean", "codes", "search", "certify", "recheck", "settle"):
        monkeypatch.setattr(triton_nearest_codebook, f"{kernel}_kernel", Launched())
    sizes = [(1, 1 << 16, 1 << 16), (1, 1 << 20, 1), (1, 1, 1 << 20), (1, 300, 1 << 18)]
    for H, N, K in [*sizes, (16, 4096, 512), (1000, 3, 5)]:
        allocated = 0
        search(
            torch.empty(1).expand(H, N, 256), torch.empty(1).expand(H, K, 256), "cosine", "exact"
        )
        assert allocated < 80 * H * (N + K) + (1 << 20) + 32 * 1024 * H
        assert N * K < 1 << 32 or allocated < 64_000_000


# ---- the rule


def rule(N: int, K: int, d: int, dtype: torch.dtype = torch.bfloat16, **other: int) -> Config:
    sizes = {"multiprocessors": 132, "shared": 227 << 10, "heads": 1} | other
    problem = Problem(sizes.pop("heads"), N, K, d, dtype)
    return configure(problem, sizes["multiprocessors"], sizes["shared"])


def test_the_rule_for_tiles() -> None:
    tiles = {16: (64, 1), 80: (128, 1), 256: (256, 1), 272: (64, 5), 768: (64, 12)}
    for d, expected in tiles.items():
        assert rule(65536, 8192, d)[2:4] == expected
    assert rule(65536, 8192, 256, shared=99 << 10)[2:4] == (64, 4)
    assert rule(65536, 8192, 256, torch.float32)[2:4] == (32, 8)
    for dtype in DTYPES:
        for d in (3, 64, 256, 1000):
            config = rule(65536, 8192, d, dtype)
            assert config.BLOCK_N % 64 == 0  # for wgmma
            assert config.num_warps % 4 == 0


def test_channels_with_addresses_of_their_own() -> None:
    x = torch.zeros(2, 8, 32, dtype=torch.bfloat16)
    assert _has_vectors(x)
    assert _has_vectors(x[:, ::2, 16:])
    assert _has_vectors(x[:, :1].expand(2, 8, 32))
    assert not _has_vectors(x[..., 1:17])
    assert not _has_vectors(x[..., :8])
    assert not _has_vectors(x[..., ::2])
    assert not _has_vectors(x.mT)
    assert not _has_vectors(torch.zeros(2, 5, 24)[..., :16])
    for dtype, expected in ((torch.bfloat16, (32, 8)), (torch.float32, (16, 16))):
        config = configure(Problem(1, 1000, 1000, 256, dtype, vectors=False), 132, 227 << 10)
        assert config[2:4] == expected


def test_the_rule_for_splits() -> None:
    assert rule(65536, 8192, 256).SPLITS == 1
    assert rule(256, 262144, 256).SPLITS == 132
    assert rule(256, 128, 256).SPLITS == 2
    assert rule(256, 262144, 256, heads=8).SPLITS == 16


def test_sizes_of_the_batch_do_not_enter_the_compile_key() -> None:
    found = {rule(N, K, 256)._replace(SPLITS=1) for N in (1, 77, 10**6) for K in (1, 1000, 10**6)}
    assert len(found) == 1


def test_wgmma_on_sm_90() -> None:
    """One instruction for 16 channels in a warp: those of sm_80 would be 16 at least."""
    module = triton_nearest_codebook_cases.__name__
    names = [case.name for case in offline.cases(module)]
    index = names.index("search-bfloat16-l2-exact-d64")
    ((card,),) = pool.run([(offline.cards, ("vq", module, index, "sm_90"))])
    assert card.error == ""
    assert card.problems == []
    assert card.loop is not None
    assert card.loop.mix["tensor"] == 4


# ---- on a GPU

REAL = [
    *(Data(kind, 4099, 1500, 64, dtype) for kind in KINDS for dtype in DTYPES),
    *(Data(kind, 3000, 1025, d, torch.bfloat16) for kind in ("random", "bisector")
      for d in (3, 128, 256, 300)),
    Data("offset", 3000, 1025, 300),
    Data("random", 5, 40000, 256, torch.bfloat16),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", REAL, ids=str)
def test_every_kind_on_a_gpu(case: Data, metric: str) -> None:
    check_nearest(case, metric, "triton", device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [16, 64, 256, 1024, 4000])
def test_sums_are_as_accurate_as_the_bound_assumes(d: int, metric: str, dtype: torch.dtype) -> None:
    for kind in ("random", "offset", "clustered", "far"):
        check_bounds(Data(kind, 500, 700, d, dtype), metric, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["random", "duplicated", "clustered"])
def test_bitwise_the_same_again_and_again(kind: str) -> None:
    x, codebook = (t.cuda()[None] for t in Data(kind, 20000, 3000, 64).make())
    first = search(x, codebook, "l2", "exact")
    assert all(torch.equal(first, search(x, codebook, "l2", "exact")) for _ in range(10))


@pytest.mark.gpu
def test_graph_capture_and_replay() -> None:
    x, codebook = (t.cuda()[None] for t in Data("random", 5000, 700, 64, torch.bfloat16).make())
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        search(x, codebook, "l2", "exact")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = search(x, codebook, "l2", "exact")
    for scale in (1.0, 1e-3, 1e3):  # certain, and not
        x.normal_()
        codebook.normal_().mul_(scale)
        graph.replay()
        assert torch.equal(found[0].cpu(), nearest(x[0], codebook[0], "l2"))


@pytest.mark.gpu
def test_offsets_past_two_to_the_31() -> None:
    x = torch.randn(1, 2**25 + 3, 64, dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 2**31
    codebook = torch.randn(1, 100, 64, dtype=torch.bfloat16, device="cuda")
    found = search(x, codebook, "l2", "exact")
    assert torch.equal(found[0, -500:].cpu(), nearest(x[0, -500:], codebook[0], "l2"))
    last = torch.arange(2**25 + 3)[-100:]
    assert torch.equal(search(x[:, -100:], x, "l2", "exact")[0].cpu(), last)  # each its own code
