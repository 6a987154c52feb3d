"""vector_quantize's kernels in Triton's interpreter: values, gradients, rows of any length.

The search has kernels and tests of its own: here the reference searches.
"""

import pytest
import torch
from torch import Tensor

from kexue_kernels.vq import quantize, triton_vector_quantize
from kexue_kernels.vq.triton_vector_quantize import Config, configure
from tests.vq.cases import (
    DTYPES,
    Data,
    Quantize,
    check_bits,
    check_close,
    check_quantize,
    generator,
)

CASES = [
    *(Quantize(Data("broken", N=40, dtype=dtype), "rotation") for dtype in DTYPES),
    *(Quantize(Data("zeros", N=40, dtype=dtype), "rotation") for dtype in DTYPES),
    *(Quantize(Data("duplicated", N=40, K=5, dtype=dtype), "ste") for dtype in DTYPES),
    Quantize(Data("broken", N=40, K=1), "ste"),  # the only code is not finite
    Quantize(Data("random", N=1, K=1, d=1), "rotation", "cosine"),
    Quantize(Data("integers", N=35, K=1, d=3), "rotation", "cosine"),
    Quantize(Data("random", N=1, K=300, d=17), "rotation"),
    Quantize(Data("offset", N=20, K=40, d=64), "rotation"),
    Quantize(Data("bisector", N=20, K=40, d=33, dtype=torch.bfloat16), "rotation", "dot", True),
    Quantize(Data("random", N=20), "ste", strided=True),
]


LONG = (2100, torch.bfloat16)


@pytest.fixture(autouse=True)
def search_by_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    search = quantize.nearest_codebook
    monkeypatch.setattr(
        quantize, "nearest_codebook", lambda *a, **k: search(*a, **{**k, "backend": "reference"})
    )


@pytest.fixture(params=["whole", "parts"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few channels to a tile: every row is read in parts."""
    if request.param == "parts":
        monkeypatch.setattr(triton_vector_quantize, "configure", lambda d: Config(4, 4))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case: Quantize, poisoned: None) -> None:
    check_quantize(case, "triton")


def backward(
    x: Tensor, codebook: Tensor, indices: Tensor, g: Tensor, gradient: str, scales: bool = True
) -> tuple[Tensor, Tensor]:
    scale_x, scale_c = torch.tensor(0.75 * scales), torch.tensor(1.5)
    found = triton_vector_quantize.backward(g, x, codebook, indices, gradient, scale_x, scale_c)
    none = triton_vector_quantize.backward(g, x, codebook, indices, gradient, scale_x, None)
    assert torch.equal(found[0], none[0])
    assert none[1].numel() == 0
    return found


def rotated(x: Tensor, q: Tensor, g: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The contract's formula, where it has no special case."""
    x, q, g = x.to(dtype), q.to(dtype), g.to(dtype)
    x_norm, q_norm = (t.norm(dim=-1, keepdim=True) for t in (x, q))
    u, p = x / x_norm, q / q_norm
    w = (u + p) / (u + p).norm(dim=-1, keepdim=True)
    along_w, along_p = (2 * (t * g).sum(-1, keepdim=True) for t in (w, p))
    return q_norm / x_norm * (g - along_w * w + along_p * u)


@pytest.mark.parametrize(("d", "dtype"), [*((d, t) for d in (1, 3, 300) for t in DTYPES), LONG])
def test_the_rotation_is_the_formula(d: int, dtype: torch.dtype) -> None:
    g = generator(d)
    x, grad = (torch.randn(5, d, generator=g).to(dtype) for _ in range(2))
    codebook = torch.randn(4, d, generator=g).to(dtype)
    indices = torch.arange(5) % 4
    if d == 1:  # opposite directions have no plane to turn in
        x, codebook = x.abs(), codebook.abs()
    no_loss = torch.tensor(0.0)
    found, _ = triton_vector_quantize.backward(
        grad, x, codebook, indices, "rotation", no_loss, None
    )
    exact = rotated(x, codebook[indices], grad)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=4e-6)


def test_rotation_where_directions_mean_nothing(tiles: None) -> None:
    q = torch.tensor([3.0, -4.0, 0.0, 0.0, 0.0])
    zero = torch.zeros(5)
    x = torch.stack([zero, 1e-7 * q, -q, -0.5 * q, -0.3 * q, q, zero, torch.full((5,), torch.nan)])
    codebook = torch.stack([q, zero])
    g = torch.tensor([[1.0, 2.0, 5.0, 0.0, -1.0]]).expand(8, 5)
    indices = torch.tensor([0, 0, 0, 0, 0, 1, 1, -1])
    found, _ = backward(x, codebook, indices, g, "rotation", scales=False)
    u = -q / 5  # of rows opposite to their code: w = 0, dx = s (g - 2 u (u.g))
    mirrored = g[0] - 2 * u * (u @ g[0])
    expected = [g[0], g[0], mirrored, 2 * mirrored, mirrored / 0.3, zero, g[0], zero]
    torch.testing.assert_close(found, torch.stack(expected))


def test_almost_opposite_directions(tiles: None) -> None:
    """w is small but means something. The interpreter rounds every step, as PyTorch does."""
    g = generator(0)
    q, grad, noise = torch.randn(3, 9, 20, generator=g)
    x = -0.7 * q + 1e-4 * noise
    found, _ = backward(x, q, torch.arange(9), grad, "rotation", scales=False)
    own = rotated(x, q, grad, torch.float32)
    check_close("grad_x", found, own, rotated(x, q, grad))


@pytest.mark.parametrize("gradient", ["ste", "rotation"])
def test_strides_change_nothing(gradient: str) -> None:
    g = generator(0)
    x, grad = torch.randn(2, 13, 5, generator=g)
    codebook, indices = torch.randn(3, 5, generator=g), torch.randint(-1, 3, (13,), generator=g)

    def of(grad: Tensor) -> Tensor:
        scale = torch.tensor(0.75)
        return triton_vector_quantize.backward(grad, x, codebook, indices, gradient, scale, None)[0]

    for same in (grad.mT.contiguous().mT, torch.stack([grad, grad], -1)[..., 1]):
        assert torch.equal(of(same), of(grad))
    one = torch.ones(1, 1).expand(13, 5)
    assert torch.equal(of(one), of(one.contiguous()))


def test_rows_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to rounding: they are added in another order."""
    g = generator(0)
    x, grad = torch.randn(2, 13, 11, generator=g)
    codebook, indices = torch.randn(3, 11, generator=g), torch.randint(-1, 3, (13,), generator=g)
    loss = triton_vector_quantize.forward(x, codebook, indices)[1]
    whole = backward(x, codebook, indices, grad, "rotation")
    monkeypatch.setattr(triton_vector_quantize, "configure", lambda d: Config(2, 4))
    quantized, found = triton_vector_quantize.forward(x, codebook, indices)
    check_bits(quantized, codebook, indices)
    torch.testing.assert_close(found, loss)
    torch.testing.assert_close(backward(x, codebook, indices, grad, "rotation"), whole)


def test_many_programs_and_none_with_a_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_vector_quantize, "MEAN_BLOCK", 2)
    monkeypatch.setattr(triton_vector_quantize, "configure", lambda d: Config(1, 8))
    x, codebook = torch.randn(5, 7), torch.randn(2, 7)
    indices = torch.tensor([1, -1, 0, -1, 1])
    quantized, loss = triton_vector_quantize.forward(x, codebook, indices)
    kept = indices >= 0
    expected = (x[kept] - codebook[indices[kept]]).square().mean()
    torch.testing.assert_close(loss, expected)
    indices = torch.full((5,), -1)
    quantized, loss = triton_vector_quantize.forward(x, codebook, indices)
    assert quantized.isnan().all()
    assert loss.item() == 0
    grads = backward(x, codebook, indices, torch.ones(5, 7), "rotation")
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


def test_codes_are_copied_bit_for_bit() -> None:
    """Negative zeros and the smallest numbers too."""
    for dtype in DTYPES:
        tiny = torch.finfo(dtype).smallest_normal / 4
        codebook = torch.tensor([[-0.0, tiny, -tiny], [torch.finfo(dtype).max, 1.0, -0.0]])
        codebook = codebook.to(dtype)
        indices = torch.tensor([1, 0, -1, 0])
        quantized, _ = triton_vector_quantize.forward(codebook[[0, 0, 0, 0]], codebook, indices)
        check_bits(quantized, codebook, indices)


def test_the_rule_for_tiles() -> None:
    """Whole rows of up to 2048 channels, 8 or 16 numbers a thread; longer ones in parts."""
    assert configure(1) == (32, 1, 4)
    assert configure(20) == (32, 32, 4)
    assert configure(256) == (4, 256, 4)
    assert configure(1025) == (1, 2048, 4)
    assert configure(2049) == (1, 1024, 4)
