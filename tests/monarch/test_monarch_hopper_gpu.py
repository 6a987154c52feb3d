"""monarch_matmul's Hopper kernels on a Hopper GPU: real sizes, graphs, large offsets, beside
Triton's."""

import pytest
import torch
from torch import Tensor

import kexue_kernels as kk
from tests.monarch.cases import Case, check_close, make, run

pytestmark = pytest.mark.gpu

BF16, F16 = torch.bfloat16, torch.float16


def square(n: int, blocks: int, N: int, dtype: torch.dtype = BF16, bias: bool = True) -> Case:
    each = n // blocks
    return Case(k=blocks, q=each, p=each, l=blocks, s=each, N=N, dtype=dtype, bias=bias)


SHAPES = [(1024, 32), (2048, 32), (4096, 64), (16384, 128)]
REAL_SIZES = [
    *(square(n, blocks, 2**24 // n) for n, blocks in SHAPES),
    *(square(n, blocks, 2**22 // n + 1, F16, bias=False) for n, blocks in SHAPES),
    Case(k=16, q=32, p=64, l=16, s=8, N=3001, dtype=BF16),  # l divides q
    Case(k=32, q=64, p=32, l=64, s=16, N=5001, dtype=F16),
    Case(k=32, q=32, p=128, l=32, s=24, N=700, dtype=BF16),  # two boxes a block
    Case(k=128, q=128, p=192, l=128, s=64, N=401, dtype=F16),  # streamed, blocks not square
]
TAILS = [1, 2, 7, 8, 31, 32, 33, 40, 63, 64, 65, 79, 80, 81, 159, 161]


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Hopper path needs compute capability 9.0")


def check(case: Case) -> None:
    """Values and gradients against float64 on the same GPU, PyTorch's own in the same dtype."""
    inputs, grad = make(case, device="cuda")
    exact = run(case, {n: x.double() for n, x in inputs.items()}, grad.double(), "reference")
    own = run(case, inputs, grad, "reference")
    for name, x in run(case, inputs, grad, "cuda").items():
        check_close(name, x.cpu(), own[name].cpu(), exact[name].cpu())


@pytest.mark.parametrize("case", REAL_SIZES, ids=str)
def test_real_sizes(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("rows", TAILS)
@pytest.mark.parametrize(("n", "blocks"), SHAPES)
def test_tails(n: int, blocks: int, rows: int) -> None:
    """The same rows give the same bits, however many others come with them."""
    inputs, _ = make(square(n, blocks, 161), device="cuda")
    whole = kk.monarch_matmul(**inputs, backend="cuda")
    few = inputs | {"x": inputs["x"][:rows]}
    assert torch.equal(kk.monarch_matmul(**few, backend="cuda"), whole[:rows])
    double = {name: t.double() for name, t in few.items()}
    exact = kk.reference.monarch_matmul(**double)
    check_close("y", whole[:rows].cpu(), kk.reference.monarch_matmul(**few).cpu(), exact.cpu())


@pytest.mark.parametrize("case", REAL_SIZES, ids=str)
def test_as_triton(case: Case) -> None:
    inputs, _ = make(case, device="cuda")
    found, triton = (case.call(inputs, backend) for backend in ("cuda", "triton"))
    eps = torch.finfo(case.dtype).eps
    scale = triton.abs().max().item()
    torch.testing.assert_close(found, triton, atol=2 * eps * scale, rtol=0)


def test_rows_that_lie_apart() -> None:
    case = square(1024, 32, 1000)
    inputs, _ = make(case, device="cuda")
    apart = torch.full((1000, 1024 + 8), torch.nan, dtype=BF16, device="cuda")[:, 8:]
    apart.copy_(inputs["x"])
    assert torch.equal(case.call(inputs | {"x": apart}, "cuda"), case.call(inputs, "cuda"))


@pytest.mark.parametrize(("n", "blocks"), SHAPES)
def test_the_same_every_time(n: int, blocks: int) -> None:
    case = square(n, blocks, 5000)
    inputs, _ = make(case, device="cuda")
    first = case.call(inputs, "cuda")
    for _ in range(20):
        assert torch.equal(case.call(inputs, "cuda"), first)


@pytest.mark.parametrize(("n", "blocks"), SHAPES)
def test_graph_replay_with_changed_contents(n: int, blocks: int) -> None:
    case = square(n, blocks, 1000)
    inputs, _ = make(case, device="cuda")
    case.call(inputs, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.call(inputs, "cuda")
    for _ in range(2):
        for x in inputs.values():
            x.normal_()
        graph.replay()
        assert torch.equal(captured, case.call(inputs, "cuda"))


@pytest.mark.parametrize(("n", "blocks"), [(4096, 64), (16384, 128)])
def test_offsets_past_two_to_the_31(n: int, blocks: int) -> None:
    case = square(n, blocks, 100)
    inputs, _ = make(case, device="cuda")
    x = torch.zeros(2**31 // n + 100, n, dtype=BF16, device="cuda")
    assert x.numel() > 2**31
    x[-100:] = inputs["x"]

    def multiply(x: Tensor) -> Tensor:
        return case.call(inputs | {"x": x}, "cuda")

    assert torch.equal(multiply(x)[-100:], multiply(inputs["x"]))
