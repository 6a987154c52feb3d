"""The Triton kernels of the monarch family on a GPU: real sizes, graphs, large offsets."""

import pytest
import torch
from torch import Tensor

import kexue_kernels as kk
from kexue_kernels.monarch import plan, triton_monarch_matmul, triton_monarch_products
from tests.monarch.cases import BLOCKS, CASES, Case, check, check_close, make, run, widened

pytestmark = pytest.mark.gpu

BF16, F32, C64 = torch.bfloat16, torch.float32, torch.complex64
REAL_SIZES = [
    Case(k=b, q=b, p=b, l=b, s=b, N=N, dtype=dtype)
    for b, N, dtype in [(32, 65536, BF16), (64, 8192, BF16), (128, 2048, BF16), (32, 8192, F32)]
]
KEPT = [  # factors that stay on chip, where a multiprocessor has room for them
    Case(k=32, q=32, p=32, l=32, s=32, N=65536, dtype=BF16),
    Case(k=32, q=64, p=32, l=64, s=16, N=5001, dtype=torch.float16),  # two groups of blocks
    Case(k=32, q=64, p=64, l=32, s=64, N=32768, dtype=BF16),  # n = 2048
    Case(k=64, q=64, p=64, l=64, s=64, N=16384, dtype=BF16),  # n = 4096
    Case(k=128, q=128, p=128, l=128, s=128, N=4096, dtype=torch.float16),  # n = 16384
    Case(k=48, q=64, p=80, l=32, s=48, N=7001, dtype=BF16, bias=False),  # two tiles of outputs
    Case(k=16, q=96, p=48, l=32, s=64, N=20000, dtype=BF16, strided=True),
]
REAL_SIZES += [
    Case(k=16, q=96, p=64, l=24, s=80, N=5000, dtype=BF16),  # l divides q
    Case(k=6, q=50, p=129, l=20, s=33, N=3001, dtype=torch.float16),
    Case(k=8, q=64, p=64, l=16, s=64, N=2048, dtype=C64),
]


@pytest.mark.parametrize("case", [*CASES, *BLOCKS], ids=str)
def test_every_case(case: Case) -> None:
    check(case, "triton", device="cuda")


@pytest.mark.parametrize("case", REAL_SIZES, ids=str)
def test_real_sizes(case: Case) -> None:
    """Against float64 on the same GPU, and PyTorch's own products in the same dtype."""
    inputs, grad = make(case, device="cuda")
    wide = torch.complex128 if case.dtype.is_complex else torch.float64
    exact = run(case, {n: x.to(wide) for n, x in inputs.items()}, grad.to(wide), "reference")
    own = run(case, inputs, grad, "reference")
    found = run(case, inputs, grad, "triton")
    for name, x in found.items():
        check_close(name, x.cpu(), own[name], exact[name].cpu())


@pytest.mark.parametrize("case", KEPT, ids=str)
def test_with_and_without_factors_on_chip(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients as above, and the same bits again, in whichever way it is done."""
    inputs, grad = make(case, device="cuda")
    exact = run(case, {n: x.double() for n, x in inputs.items()}, grad.double(), "reference")
    own = run(case, inputs, grad, "reference")
    for shared in (0, plan.RESIDENT_SHARED):
        if shared > triton_monarch_products.shared_memory(grad.device):
            continue
        monkeypatch.setattr(triton_monarch_matmul, "shared_memory", lambda _, n=shared: n)
        found = run(case, inputs, grad, "triton")
        again = run(case, inputs, grad, "triton")
        for name, x in found.items():
            check_close(name, x.cpu(), own[name], exact[name].cpu())
            assert torch.equal(x, again[name]), name


@pytest.mark.parametrize("case", KEPT, ids=str)
def test_what_is_kept(case: Case) -> None:
    inputs, _ = make(case, device="cuda")
    x, w1, w2 = (inputs[name] for name in ("x", "w1", "w2"))
    shared = triton_monarch_products.shared_memory(x.device)
    assert shared >= 48 * 1024
    chosen = triton_monarch_matmul._plan(x, w1, w2, shared)
    assert chosen.resident == (shared >= plan.RESIDENT_SHARED)


def test_tf32_where_pytorch_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(k=32, q=32, p=32, l=32, s=32, N=4096)
    inputs, _ = make(case, device="cuda")
    exact = kk.reference.monarch_matmul(*(widened(x) for x in inputs.values()))

    def error() -> float:
        y = kk.monarch_matmul(**inputs, backend="triton")
        return (widened(y) - exact).abs().max().item() / exact.abs().max().item()

    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    plain = error()
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    assert plain < 1e-6 < error() < 1e-2


@pytest.mark.parametrize(
    "case", [Case(k=16, q=32, p=48, l=32, s=16, N=1000, dtype=BF16), *KEPT[:4:3]], ids=str
)
def test_graph_capture_and_replay(case: Case) -> None:
    inputs, grad = make(case, device="cuda")

    def both() -> dict[str, Tensor]:
        return run(case, inputs, grad, "triton")

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for _ in range(3):
        for x in (*inputs.values(), grad):
            x.normal_()
        graph.replay()
        again = both()
        assert all(torch.equal(x, again[name]) for name, x in captured.items())


@pytest.mark.parametrize("blocks", [32, 64])
def test_offsets_past_two_to_the_31(blocks: int) -> None:
    case = Case(k=blocks, q=blocks, p=blocks, l=blocks, s=blocks, N=100, dtype=BF16)
    inputs, _ = make(case, device="cuda")
    rows = 2**31 // blocks**2 + 100
    x = torch.randn(rows, blocks**2, dtype=BF16, device="cuda", requires_grad=True)
    assert x.numel() > 2**31
    factors = {name: value for name, value in inputs.items() if name != "x"}
    y = kk.monarch_matmul(x, **factors, backend="triton")
    (dx,) = torch.autograd.grad(y, x, y)
    few = x.detach()[-100:].clone().requires_grad_()
    y_few = kk.monarch_matmul(few, **factors, backend="triton")
    (dx_few,) = torch.autograd.grad(y_few, few, y_few)
    torch.testing.assert_close(y[-100:], y_few)
    torch.testing.assert_close(dx[-100:], dx_few)
