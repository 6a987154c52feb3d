"""vector_quantize and codebook_statistics in C++: instruction sets, threads, small norms."""

import pytest
import torch
from torch import Tensor

from kexue_kernels.vq import cpu_codebook_statistics, cpu_vector_quantize
from tests import cpu
from tests.vq.cases import DTYPES, QUANTIZE, Quantize, check_quantize, check_statistics, generator

cpu.extension()


@pytest.mark.parametrize("case", QUANTIZE, ids=str)
def test_against_the_reference(case: Quantize, isa: str, poisoned: None) -> None:
    check_quantize(case, "cpu")


def backward(
    x: Tensor, codebook: Tensor, indices: Tensor, g: Tensor, gradient: str, scales: bool = True
) -> tuple[Tensor, Tensor]:
    scale_x, scale_c = torch.tensor(0.75 * scales), torch.tensor(1.5)
    found = cpu_vector_quantize.backward(g, x, codebook, indices, gradient, scale_x, scale_c)
    none = cpu_vector_quantize.backward(g, x, codebook, indices, gradient, scale_x, None)
    assert torch.equal(found[0], none[0])
    assert none[1].numel() == 0
    return found


def rotated(x: Tensor, q: Tensor, g: Tensor) -> Tensor:
    """The contract's formula in float64, where it has no special case."""
    x, q, g = x.double(), q.double(), g.double()
    x_norm, q_norm = (t.norm(dim=-1, keepdim=True) for t in (x, q))
    u, p = x / x_norm, q / q_norm
    w = (u + p) / (u + p).norm(dim=-1, keepdim=True)
    along_w, along_p = (2 * (t * g).sum(-1, keepdim=True) for t in (w, p))
    return q_norm / x_norm * (g - along_w * w + along_p * u)


@pytest.mark.parametrize("d", [1, 3, 17, 300, 1030])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rotation_is_the_formula(d: int, dtype: torch.dtype, isa: str) -> None:
    g = generator(d)
    x, grad = (torch.randn(9, d, generator=g).to(dtype) for _ in range(2))
    codebook = torch.randn(4, d, generator=g).to(dtype)
    indices = torch.arange(9) % 4
    if d == 1:  # opposite directions have no plane to turn in
        x, codebook = x.abs(), codebook.abs()
    found, _ = backward(x, codebook, indices, grad, "rotation", scales=False)
    exact = rotated(x, codebook[indices], grad)
    eps = torch.finfo(dtype).eps
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=eps, atol=1e-6)


def test_rotation_where_directions_mean_nothing(isa: str) -> None:
    q = torch.tensor([3.0, -4.0, 0.0])
    zero = torch.zeros(3)
    x = torch.stack([zero, 1e-7 * q, -q, -0.5 * q, q, zero, torch.full((3,), torch.nan)])
    codebook = torch.stack([q, zero])
    g = torch.tensor([[1.0, 2.0, 5.0]]).expand(7, 3)
    indices = torch.tensor([0, 0, 0, 0, 1, 1, -1])
    found, _ = backward(x, codebook, indices, g, "rotation", scales=False)
    u = -q / 5  # of rows opposite to their code: w = 0, dx = s (g - 2 u (u.g))
    mirrored = g[0] - 2 * u * (u @ g[0])
    expected = torch.stack([g[0], g[0], mirrored, 2 * mirrored, zero, g[0], zero])
    torch.testing.assert_close(found, expected)


def test_almost_opposite_directions(isa: str) -> None:
    """w is small but means something: 1e-5 is far above what float64 leaves of u + p."""
    g = generator(0)
    q = torch.randn(5, 64, generator=g)
    x = -q + 1e-4 * torch.randn(5, 64, generator=g)
    grad = torch.randn(5, 64, generator=g)
    found, _ = backward(x, q, torch.arange(5), grad, "rotation", scales=False)
    torch.testing.assert_close(found.double(), rotated(x, q, grad), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradient", ["ste", "rotation"])
def test_threads_and_strides_change_nothing(gradient: str, keep_threads: None) -> None:
    g = generator(0)
    x, grad = torch.randn(2, 2000, 33, generator=g)
    codebook = torch.randn(7, 33, generator=g)
    indices = torch.randint(-1, 7, (2000,), generator=g)
    indices[:900] = 3  # one code has most rows
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for each in (grad, grad.mT.contiguous().mT):
            forward = cpu_vector_quantize.forward(x, codebook, indices)
            found.append((forward[1], *backward(x, codebook, indices, each, gradient)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    one = torch.ones(1, 1).expand(2000, 33)
    torch.testing.assert_close(
        backward(x, codebook, indices, one, gradient)[0],
        backward(x, codebook, indices, one.contiguous(), gradient)[0],
        rtol=0,
        atol=0,
    )


def test_no_row_has_a_code() -> None:
    x, codebook = torch.randn(3, 5), torch.randn(2, 5)
    indices = torch.full((3,), -1)
    quantized, loss = cpu_vector_quantize.forward(x, codebook, indices)
    assert quantized.isnan().all()
    assert loss.item() == 0
    grads = backward(x, codebook, indices, torch.ones(3, 5), "ste")
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


# Rows are summed in blocks of 256 or more: codes within one, over the edge of two, over many.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "K", "d"),
    [(1, 1, 1), (7, 3, 300), (1000, 1, 17), (1000, 2, 3), (3000, 50, 5), (600, 900, 4)],
)
def test_statistics(N: int, K: int, d: int, dtype: torch.dtype, isa: str, poisoned: None) -> None:
    g = generator(N + K)
    x = torch.randn(N, d, generator=g).to(dtype)
    check_statistics(x, torch.randint(-1, K, (N,), generator=g), K, "cpu")
    sizes = torch.rand(N, generator=g).pow(4) * K  # low codes have most rows
    check_statistics(x, sizes.long(), K, "cpu")
    check_statistics(x, torch.full((N,), -1), K, "cpu")


def test_sums_are_rounded_once(keep_threads: None) -> None:
    """Added in float64, and in one order."""
    g = generator(0)
    x = 1e4 + torch.randn(50_000, 3, generator=g)
    indices = torch.randint(2, (50_000,), generator=g)
    exact = torch.zeros(2, 3, dtype=torch.float64).index_add(0, indices, x.double()).float()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        counts, sums = cpu_codebook_statistics.statistics(x, indices, 2)
        assert torch.equal(sums, exact)
        assert torch.equal(counts, indices.bincount())


def test_indices_out_of_range_are_no_rows() -> None:
    """They are refused before; nothing is read or written there all the same."""
    x = torch.ones(4, 2)
    counts, sums = cpu_codebook_statistics.statistics(x, torch.tensor([0, 3, -5, 2**40]), 3)
    assert counts.tolist() == [1, 0, 0]
    assert torch.equal(sums, torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]))
