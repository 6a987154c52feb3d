"""The vq family on a GPU: real sizes, graphs, large offsets, and its arithmetic as assumed."""

import copy
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from kexue_kernels import vq
from kexue_kernels.nn.vq import ResidualVQ, VectorQuantizer
from kexue_kernels.vq import reference, triton_vector_quantize
from tests.vq.cases import (
    DTYPES,
    EVERY_KIND,
    METRICS,
    QUANTIZE,
    SHAPES,
    Data,
    Quantize,
    check_bits,
    check_close,
    check_nearest,
    check_quantize,
    check_statistics,
    generator,
)

pytestmark = pytest.mark.gpu


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


# ---- the cases of every backend


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", EVERY_KIND + SHAPES, ids=str)
def test_search(case: Data, metric: str) -> None:
    check_nearest(case, metric, "triton", "cuda")


@pytest.mark.parametrize("case", QUANTIZE, ids=str)
def test_quantize(case: Quantize) -> None:
    check_quantize(case, "triton", "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "K", "d"), [(1, 1, 1), (1000, 1, 17), (3000, 50, 5), (70_000, 8192, 64), (500, 70_000, 8)]
)
def test_statistics(N: int, K: int, d: int, dtype: torch.dtype) -> None:
    g = generator(N + K)
    x = torch.randn(N, d, generator=g).to(dtype)
    check_statistics(x, torch.randint(-1, K, (N,), generator=g), K, "triton", "cuda")
    sizes = torch.rand(N, generator=g).pow(4) * K  # low codes have most rows
    check_statistics(x, sizes.long(), K, "triton", "cuda")
    check_statistics(x, torch.full((N,), K - 1), K, "triton", "cuda")


def test_indices_out_of_range_are_ignored() -> None:
    indices = torch.tensor([0, 3, -5, 2**40, -(2**40), 0], device="cuda")
    counts, sums = vq.codebook_statistics(torch.ones(6, 2, device="cuda"), indices, 3)
    assert counts.tolist() == [2, 0, 0]
    assert sums.tolist() == [[2, 2], [0, 0], [0, 0]]


# ---- real sizes

REAL_SIZES = [
    *(Data("clustered", 16384, 8192, 256, dtype) for dtype in DTYPES),
    Data("offset", 100_000, 1024, 64, torch.bfloat16),
    Data("duplicated", 256, 262_144, 64),
    Data("bisector", 10_007, 1009, 67),
]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", REAL_SIZES, ids=str)
def test_search_at_real_sizes(case: Data, metric: str) -> None:
    """Against the definition in float64, in some rows."""
    x, codebook = (t.cuda() for t in case.make())
    found = vq.nearest_codebook(x, codebook, metric=metric, backend="triton")
    some = slice(None, None, max(1, case.N // 500))
    exact = reference.nearest_codebook(x[some], codebook, metric=metric)
    assert torch.equal(found[some], exact)
    fast = vq.nearest_codebook(x, codebook, metric=metric, precision="fast", backend="triton")
    assert fast.min() >= 0
    assert fast.max() < case.K


@pytest.mark.parametrize("gradient", ["ste", "rotation"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize_at_real_sizes(gradient: str, dtype: torch.dtype) -> None:
    check_quantize(Quantize(Data("random", 2000, 256, 256, dtype), gradient), "triton", "cuda")


@pytest.mark.parametrize("d", [1000, 2100])
def test_long_rows(d: int) -> None:
    check_quantize(Quantize(Data("random", 50, 20, d), "rotation"), "triton", "cuda")


def test_almost_opposite_directions() -> None:
    """Their bisector is small but means something: |x| / |q| is not known to more than 1e-7."""
    q, grad, noise = draw(3, 500, 256)
    x, zero = -0.7 * q + 1e-4 * noise, torch.zeros((), device="cuda")
    indices = torch.arange(500, device="cuda")
    found, _ = triton_vector_quantize.backward(grad, x, q, indices, "rotation", zero, None)
    x, q, g = x.double(), q.double(), grad.double()
    x_norm, q_norm = (t.norm(dim=-1, keepdim=True) for t in (x, q))
    u, p = x / x_norm, q / q_norm
    w = (u + p) / (u + p).norm(dim=-1, keepdim=True)
    along_w, along_p = (2 * (t * g).sum(-1, keepdim=True) for t in (w, p))
    exact = q_norm / x_norm * (g - along_w * w + along_p * u)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_bitwise_the_same_again_and_again() -> None:
    x, codebook, grad = draw(50_000, 64), draw(300, 64), draw(50_000, 64)
    leaves = x.requires_grad_(), codebook.requires_grad_()

    def once() -> list[Tensor]:
        out = vq.vector_quantize(*leaves, gradient="rotation", backend="triton")
        loss = out.commitment_loss + out.codebook_loss
        grads = torch.autograd.grad((out.quantized, loss), leaves, (grad, torch.ones_like(loss)))
        return [*out, *grads, *vq.codebook_statistics(x, out.indices, 300, backend="triton")]

    first = once()
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


def test_the_update_is_that_of_the_cpu() -> None:
    """And again with all inputs in other strides, and a codebook of halves."""
    g = generator(0)
    for dtype in DTYPES:
        x = torch.randn(5000, 40, generator=g).to(dtype)
        indices = torch.randint(-1, 3000, (5000,), generator=g)
        size = torch.rand(3000, generator=g) + 0.1
        total = torch.randn(3000, 40, generator=g)
        plain = [total.to(dtype), size, total]
        runs = []
        for wide in (torch.float64, None):
            running = [t.to(wide or t.dtype, copy=True) for t in plain]
            rows = x.to(wide or dtype)
            vq.ema_update_(*running, rows, indices, decay=0.9, backend="reference")
            runs.append(running)
        for spread in (False, True):
            found = [torch.stack([t.cuda()] * 2, -1)[..., 0] if spread else t.cuda() for t in plain]
            vq.ema_update_(*found, x.cuda(), indices.cuda(), decay=0.9)
            for exact, own, mine in zip(*runs, found, strict=True):
                check_close("update", mine, own, exact)


def test_memory_of_the_search_and_the_sums() -> None:
    """65536 rows and codes: the matrix of all distances would be 17 GB."""
    x, codebook = draw(65536, 64), draw(65536, 64)
    vq.nearest_codebook(x[:64], codebook[:64])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    indices = vq.nearest_codebook(x, codebook, backend="triton")
    output = indices.numel() * 8
    assert torch.cuda.max_memory_allocated() - before - output < 64e6
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    counts, sums = vq.codebook_statistics(x, indices, 65536, backend="triton")
    output = counts.numel() * 8 + sums.numel() * 4
    assert torch.cuda.max_memory_allocated() - before - output < 64e6


# ---- graphs


def capture(step: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """`step` recorded, after one call of it, with the tensors that a replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    return graph, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("gradient", ["ste", "rotation"])
def test_functions_in_a_graph(gradient: str, metric: str, dtype: torch.dtype) -> None:
    """The search, its recheck included, quantisation, losses, both gradients, counts and sums."""
    x, codebook, grad = (draw(*shape, dtype=dtype) for shape in ((3000, 64), (700, 64), (3000, 64)))
    leaves = x.requires_grad_(), codebook.requires_grad_()
    options = {"metric": metric, "gradient": gradient, "backend": "triton"}

    def step() -> list[Tensor]:
        out = vq.vector_quantize(*leaves, **options)
        loss = out.commitment_loss + 2 * out.codebook_loss
        grads = torch.autograd.grad((out.quantized, loss), leaves, (grad, torch.ones_like(loss)))
        return [*out, *grads, *vq.codebook_statistics(x, out.indices, 700, backend="triton")]

    graph, captured = capture(step)
    for round_ in range(4):
        with torch.no_grad():
            for t in (x, codebook, grad):
                t.normal_()
            if round_ == 1:  # equal codes: every row is compared again
                codebook[350:] = codebook[:350]
            if round_ == 2:
                x[::5, 3] = torch.nan
            if round_ == 3:
                x.fill_(torch.inf)
        graph.replay()
        for found, expected in zip(captured, step(), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_the_update_in_a_graph() -> None:
    x, indices = draw(3000, 40), torch.randint(-1, 500, (3000,), device="cuda")
    running = [draw(500, 40), torch.rand(500, device="cuda"), draw(500, 40)]
    graph, _ = capture(lambda: [vq.ema_update_(*running, x, indices, decay=0.9)])
    for _ in range(3):
        x.normal_()
        indices.random_(-1, 500)
        eager = [t.clone() for t in running]
        vq.ema_update_(*eager, x, indices, decay=0.9)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(running, eager, strict=True))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "learned": lambda: VectorQuantizer(32, 100, gradient="rotation"),
    "ema": lambda: VectorQuantizer(32, 100, ema_decay=0.9),
    "ema-heads-cosine": lambda: VectorQuantizer(32, 100, ema_decay=0.9, heads=2, metric="cosine"),
    "simvq": lambda: VectorQuantizer(32, 100, simvq=True),
    "learned-dead": lambda: VectorQuantizer(32, 100, dead_code_threshold=1),
    "ema-dead": lambda: VectorQuantizer(32, 100, ema_decay=0.9, dead_code_threshold=1),
    "residual": lambda: ResidualVQ(32, 100, 3, ema_decay=0.9),
}


def training_step(layer: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    quantized, indices, loss = layer(x)
    leaves = (x, *layer.parameters())
    grads = torch.autograd.grad((quantized, loss), leaves, (grad, torch.ones_like(loss)))
    return [quantized, indices, loss, *grads]


@pytest.mark.parametrize("name", MODULES)
def test_modules_read_nothing_back(name: str) -> None:
    torch.manual_seed(0)
    layer, x, grad = MODULES[name]().cuda(), draw(500, 32).requires_grad_(), draw(500, 32)
    training_step(layer, x, grad)
    torch.cuda.set_sync_debug_mode("error")
    try:
        training_step(layer, x, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", MODULES)
def test_training_in_a_graph(name: str) -> None:
    torch.manual_seed(0)
    layer, x, grad = MODULES[name]().cuda(), draw(500, 32).requires_grad_(), draw(500, 32)
    graph, captured = capture(lambda: training_step(layer, x, grad))
    for _ in range(3):
        with torch.no_grad():
            x.normal_()
            grad.normal_()
        eager = copy.deepcopy(layer)
        expected = training_step(eager, x, grad)
        graph.replay()
        for found, each in zip(captured, expected, strict=True):
            torch.testing.assert_close(found, each)
        states = zip(layer.state_dict().items(), eager.state_dict().values(), strict=True)
        for (key, found), each in states:
            assert found.isfinite().all(), key
            if "dead" not in name:  # what replaces dead codes is drawn by chance
                torch.testing.assert_close(found, each)


# ---- more than 2**31 elements


def test_offsets_of_rows() -> None:
    """The last rows of x, which begin past 2**31 elements."""
    N, d, near = 2**23 + 77, 259, 500
    x = torch.empty(N, d, dtype=torch.bfloat16, device="cuda").normal_()
    assert x.numel() > 2**31
    codebook = draw(9, d, dtype=torch.bfloat16)
    indices = vq.nearest_codebook(x, codebook, backend="triton")
    assert torch.equal(indices[-near:], reference.nearest_codebook(x[-near:], codebook))
    indices[-near:] = 8
    indices[:-near].clamp_(max=7)
    quantized, _ = triton_vector_quantize.forward(x, codebook, indices)
    check_bits(quantized[-near:], codebook, indices[-near:])
    _, sums = vq.codebook_statistics(x, indices, 9, backend="triton")
    torch.testing.assert_close(sums[8].double(), x[-near:].double().sum(0), rtol=1e-5, atol=1e-4)
    zero = torch.zeros((), device="cuda")
    found, _ = triton_vector_quantize.backward(
        quantized, x, codebook, indices, "rotation", zero, None
    )
    few, _ = triton_vector_quantize.backward(
        quantized[-near:], x[-near:], codebook, indices[-near:], "rotation", zero, None
    )
    assert torch.equal(found[-near:], few)


def test_offsets_of_codes() -> None:
    """The last codes, which begin past 2**31 elements."""
    K, d, N = 2**23 + 77, 259, 500
    codebook = torch.empty(K, d, dtype=torch.bfloat16, device="cuda").normal_()
    assert codebook.numel() > 2**31
    expected = torch.arange(K - N, K, device="cuda")
    x = codebook[-N:].clone()
    assert torch.equal(vq.nearest_codebook(x, codebook, backend="triton"), expected)
    quantized, loss = triton_vector_quantize.forward(x, codebook, expected)
    assert torch.equal(quantized, x)
    assert loss.item() == 0
    zero, one = torch.zeros((), device="cuda"), torch.ones((), device="cuda")
    _, grad = triton_vector_quantize.backward(x, x + 1, codebook, expected, "ste", zero, one)
    assert grad[:-N].count_nonzero() == 0
    difference = codebook[-N:].float() - (x + 1).float()
    torch.testing.assert_close(grad[-N:].float(), 2 / (N * d) * difference, rtol=0.01, atol=0)


# ---- the accumulation that the bound of the search assumes


@triton.jit
def _dot_kernel(
    x_ptr, c_ptr, out_ptr, d, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    rows, channels = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, d, BLOCK_D):
        x = tl.load(x_ptr + rows * d + start + channels[None, :])
        c = tl.load(c_ptr + rows * d + start + channels[None, :])
        total = tl.dot(x, tl.trans(c), total, input_precision=PRECISION)
    tl.store(out_ptr + rows * BLOCK + tl.arange(0, BLOCK)[None, :], total)


def _random(d: int) -> Tensor:
    return draw(2, 128, d)


def _positive(d: int) -> Tensor:
    """Every addition that truncates errs in the same direction."""
    return draw(2, 128, d).abs() + 1


def _wide(d: int) -> Tensor:
    """Terms of many magnitudes: most are far below the largest."""
    return draw(2, 128, d) * 2.0 ** torch.randint(-12, 1, (2, 128, d), device="cuda")


def _swallowed(d: int) -> Tensor:
    """One large term, and all others about half of its last digit."""
    x = torch.full((2, 128, d), 2.0**-12, device="cuda") * (1 + torch.rand(128, 1, device="cuda"))
    x[..., 0] = 1
    return x


def _cancelling(d: int) -> Tensor:
    x = _positive(d)
    x[0, :, 1::2] *= -1
    return x


@pytest.mark.parametrize("make", [_random, _positive, _wide, _swallowed, _cancelling])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32", "ieee"])
@pytest.mark.parametrize("d", [32, 64, 256, 1024, 4096])
def test_accumulation(d: int, precision: str, make: Callable[[int], Tensor]) -> None:
    """|fl(x.c) - x.c| <= 1.125 d 2^-23 |x||c|, the operands being taken as they are."""
    x, c = make(d)
    if precision == "tf32":  # ten digits: rounding operands is bounded apart
        x, c = ((t.view(torch.int32) & -(2**13)).view(torch.float32) for t in (x, c))
    elif precision != "ieee":
        x, c = (t.to({"bf16": torch.bfloat16, "fp16": torch.float16}[precision]) for t in (x, c))
    out = torch.empty(128, 128, device="cuda")
    mode = precision if precision in ("tf32", "ieee") else None
    _dot_kernel[(1,)](x, c, out, d, PRECISION=mode, BLOCK=128, BLOCK_D=32, num_warps=4)
    x, c = x.double(), c.double()
    allowed = 1.125 * d * 2**-23 * x.norm(dim=1)[:, None] * c.norm(dim=1)
    assert ((out.double() - x @ c.T).abs() <= allowed).all()
