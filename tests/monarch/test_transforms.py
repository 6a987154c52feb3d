"""hadamard and dft as Monarchs: against Sylvester's definition and torch.fft, to 1e-6."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kexue_kernels.monarch.projection import project_to_monarch
from kexue_kernels.monarch.reference import monarch_matmul, monarch_to_dense
from kexue_kernels.monarch.transforms import dft, hadamard

SIZES = [(1, None), (2, None), (12, None), (12, 2), (12, 12), (13, None), (64, None), (512, 4)]
POWERS = [(1, None), (2, None), (8, None), (16, 8), (64, None), (512, 512)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def sylvester(n: int) -> Tensor:
    """(-1) to the number of binary digits that i and j share."""
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)])


@pytest.mark.parametrize(("n", "nblocks"), POWERS)
def test_hadamard_is_sylvesters(n: int, nblocks: int | None) -> None:
    w1, w2 = hadamard(n, nblocks)
    k = w1.shape[0]
    assert w1.shape == (k, n // k, n // k)
    assert w2.shape == (n // k, k, k)
    assert k == (nblocks or 2 ** (n.bit_length() // 2 - (n.bit_length() % 2 == 0)))
    assert torch.equal(monarch_to_dense(w1, w2), sylvester(n))


@pytest.mark.parametrize(
    ("norm", "scale"), [("backward", 1), ("ortho", 1 / 8), ("forward", 1 / 64)]
)
def test_hadamard_norms(norm: str, scale: float) -> None:
    w1, w2 = hadamard(64, norm=norm)
    torch.testing.assert_close(monarch_to_dense(w1, w2), scale * sylvester(64), rtol=1e-6, atol=0)
    if norm == "ortho":
        x = torch.randn(3, 64)
        back = monarch_matmul(monarch_matmul(x, w1, w2), w1, w2)
        torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex64], ids=str)
def test_hadamard_dtypes(dtype: torch.dtype) -> None:
    w1, w2 = hadamard(16, dtype=dtype)
    assert w1.dtype == w2.dtype == dtype
    assert w1.is_contiguous()
    assert w2.is_contiguous()
    assert torch.equal(monarch_to_dense(w1, w2), sylvester(16).to(dtype))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("norm", ["backward", "ortho", "forward"])
@pytest.mark.parametrize(("n", "nblocks"), SIZES)
def test_dft_is_that_of_torch_fft(n: int, nblocks: int | None, norm: str, inverse: bool) -> None:
    w1, w2, permutation = dft(n, nblocks, inverse=inverse, norm=norm)
    k = w1.shape[0]
    assert k == (nblocks or {12: 3, 64: 8}.get(n, 1))
    assert w1.shape == (k, n // k, n // k)
    assert w2.shape == (n // k, k, k)
    x = torch.randn(5, n, dtype=torch.complex64)
    transform = torch.fft.ifft if inverse else torch.fft.fft
    expected = transform(x.to(torch.complex128), norm=norm)
    made = monarch_matmul(x[..., permutation], w1, w2)
    assert (made - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("n", [60, 1024])
def test_dft_in_double_is_exact_to_double(n: int) -> None:
    w1, w2, permutation = dft(n, dtype=torch.complex128)
    x = torch.randn(2, n, dtype=torch.complex128)
    made = monarch_matmul(x[..., permutation], w1, w2)
    torch.testing.assert_close(made, torch.fft.fft(x), rtol=1e-12, atol=1e-12 * n)


@pytest.mark.parametrize("make", [hadamard, dft])
def test_the_default_device_is_followed_unless_one_is_given(make: Callable) -> None:
    expected = make(8)
    with torch.device("meta"):
        assert all(found.is_meta for found in make(8))
        given = make(8, device="cpu")
    for found, other in zip(given, expected, strict=True):
        assert torch.equal(found, other)


def test_projection_finds_the_dft_again() -> None:
    """The matrix, its columns permuted, is a Monarch of rank 1 to rounding."""
    _, _, permutation = dft(64)
    matrix = torch.fft.fft(torch.eye(64, dtype=torch.complex128)).T
    w1, w2, error = project_to_monarch(matrix[:, permutation].to(torch.complex64), 8)
    assert error < 1e-6
    assert (monarch_to_dense(w1, w2) - matrix[:, permutation]).norm() <= 1e-6 * matrix.norm()
    assert project_to_monarch(matrix, 8)[2] > 0.1  # not without the permutation


def test_projection_finds_the_hadamard_again() -> None:
    *_, error = project_to_monarch(sylvester(64), 8)
    assert error < 1e-6


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: hadamard(12), ValueError, ["n", "power of two", "12"]),
        (lambda: hadamard(0), ValueError, ["n", "at least 1", "0"]),
        (lambda: hadamard(8.0), TypeError, ["n", "int", "float"]),
        (lambda: hadamard(8, 3), ValueError, ["nblocks", "divisor of n = 8", "3"]),
        (lambda: hadamard(8, "2"), TypeError, ["nblocks", "int", "str"]),
        (lambda: hadamard(8, norm="unit"), ValueError, ["norm", "ortho", "unit"]),
        (lambda: hadamard(8, norm=None), TypeError, ["norm", "str", "NoneType"]),
        (lambda: hadamard(8, dtype=torch.int64), ValueError, ["dtype", "float32", "int64"]),
        (lambda: hadamard(8, dtype="float"), TypeError, ["dtype", "torch.dtype", "str"]),
        (lambda: dft(12, 5), ValueError, ["nblocks", "divisor of n = 12", "5"]),
        (lambda: dft(8, dtype=torch.float32), ValueError, ["dtype", "complex64", "float32"]),
        (lambda: dft(8, inverse=1), TypeError, ["inverse", "bool", "int"]),
    ],
)
def test_bad_input(call: object, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()  # type: ignore[operator]
    for word in words:
        assert word in str(caught.value)
