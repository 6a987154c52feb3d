"""vector_quantize's contract: values, losses and gradients against their formulas."""

import pytest
import torch
from torch import Tensor

from kexue_kernels import vq
from tests.vq.cases import QUANTIZE, Data, Quantize, check_bits, check_quantize, make, run, widened

BACKENDS = ["reference", "cpu"]
GRADIENTS = ["ste", "rotation"]


@pytest.mark.parametrize("case", QUANTIZE, ids=str)
def test_blocked_pytorch(case: Quantize, without_extension: None, poisoned: None) -> None:
    check_quantize(case, "cpu")


def formula(x: Tensor, q: Tensor, g: Tensor, gradient: str) -> Tensor:
    """dx of one row, as the contract says it."""
    if gradient == "ste" or x.norm() < 1e-6:
        return g
    if q.norm() == 0:
        return torch.zeros_like(g)
    u, p, s = x / x.norm(), q / q.norm(), q.norm() / x.norm()
    w = u + p
    w = w / w.norm() if w.norm() >= 1e-6 else torch.zeros_like(w)
    return s * (g - 2 * w * (w @ g) + 2 * u * (p @ g))


def by_hand(case: Quantize) -> dict[str, Tensor]:
    """Losses and gradients in float64, row by row."""
    inputs = widened(make(case))
    indices = run(case, inputs, "reference")["indices"]
    a, b = inputs.scales
    rows = (indices >= 0).nonzero()[:, 0].tolist()
    terms = max(1, len(rows) * inputs.x.shape[1])
    loss = torch.zeros((), dtype=torch.float64)
    grad_x, grad_codebook = torch.zeros_like(inputs.x), torch.zeros_like(inputs.codebook)
    for n in rows:
        x, q = inputs.x[n], inputs.codebook[indices[n]]
        loss += (x - q).square().sum() / terms
        passed = formula(x, q, inputs.grad[n], case.gradient)
        grad_x[n] = passed + a * 2 * (x - q) / terms
        grad_codebook[indices[n]] += b * 2 * (q - x) / terms
    losses = {"commitment_loss": loss, "codebook_loss": loss}
    return {**losses, "grad_x": grad_x, "grad_codebook": grad_codebook}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("kind", ["random", "zeros", "broken", "duplicated", "offset"])
def test_reference_is_the_formula(kind: str, gradient: str) -> None:
    case = Quantize(Data(kind, N=30, K=12, d=5), gradient)
    found = run(case, widened(make(case)), "reference")
    check_bits(found["quantized"], widened(make(case)).codebook, found["indices"])
    for name, expected in by_hand(case).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=1e-12)


CORNERS = [  # x, q
    ((0.0, 0.0), (1.0, 2.0)),
    ((1e-8, 0.0), (1.0, 2.0)),
    ((0.0, 0.0), (0.0, 0.0)),
    ((1.0, 2.0), (0.0, 0.0)),
    ((1.0, 2.0), (-1.0, -2.0)),
    ((1.0, 2.0), (-3.0, -6.0)),
    ((1.0, 2.0), (1.0, 2.0)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(("x", "q"), CORNERS, ids=str)
def test_corners_of_the_rotation(
    x: tuple[float, ...], q: tuple[float, ...], gradient: str, backend: str
) -> None:
    row, codebook = torch.tensor([x], requires_grad=True), torch.tensor([q])
    g = torch.tensor([[0.3, -0.7]])
    quantized = vq.vector_quantize(row, codebook, gradient=gradient, backend=backend)[0]
    assert torch.equal(quantized, codebook)
    (found,) = torch.autograd.grad(quantized, row, g)
    expected = formula(row[0].detach().double(), codebook[0].double(), g[0].double(), gradient)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_near_the_opposite_direction() -> None:
    """Where u + p is small but not yet called zero; x and its code in float64."""
    x = torch.tensor([[0.6, 0.8]], dtype=torch.float64, requires_grad=True)
    for off in (1e-5, -1e-3):
        codebook = torch.tensor([[-0.6, -0.8 + off]], dtype=torch.float64)
        g = torch.tensor([[0.3, -0.7]], dtype=torch.float64)
        out = vq.vector_quantize(x, codebook, gradient="rotation")
        (found,) = torch.autograd.grad(out.quantized, x, g)
        expected = formula(x[0].detach(), codebook[0], g[0], "rotation")
        torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-9)
        assert found.norm().item() == pytest.approx((codebook.norm() * g.norm()).item())


def check_huge(dtype: torch.dtype, scale: float, backend: str) -> None:
    """Squares of rows and codes are beyond float32, their quotients are not."""
    x = torch.tensor([[0.9, 0.5], [-0.4, 0.7], [0.0, 0.0]]).mul(scale).to(dtype).requires_grad_()
    codebook = torch.tensor([[1.0, 0.3], [-0.8, 0.9], [0.2, -0.1]]).mul(scale).to(dtype)
    g = torch.tensor([[0.3, -0.7], [1.2, 0.5], [-0.1, 0.6]]).to(dtype)
    out = vq.vector_quantize(x, codebook, gradient="rotation", backend=backend)
    (found,) = torch.autograd.grad(out.quantized, x, g)
    rows = (t.double() for t in (x.detach(), out.quantized.detach(), g))
    expected = torch.stack([formula(*row, "rotation") for row in zip(*rows, strict=True)])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("scale", [1e22, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rotation_of_huge_rows(backend: str, dtype: torch.dtype, scale: float) -> None:
    check_huge(dtype, scale, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_of_huge_rows_in_blocks(dtype: torch.dtype, without_extension: None) -> None:
    check_huge(dtype, 1e22, "cpu")
    check_huge(dtype, 3e38, "cpu")


def test_differences_beyond_float32_in_blocks(without_extension: None) -> None:
    x, codebook = torch.full((1, 2), 3e38, requires_grad=True), torch.full((1, 2), -3e38)
    quantized = vq.vector_quantize(x, codebook, backend="cpu").quantized
    assert torch.autograd.grad(quantized.sum(), x)[0].tolist() == [[1, 1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_half_codebook_are_added_in_more(backend: str) -> None:
    """One row's part of it is below float16's normal numbers."""
    x = torch.ones(3000, 40, dtype=torch.float16)
    codebook = torch.full((2, 40), 1.3, dtype=torch.float16)
    codebook[1] = 9
    loss = vq.vector_quantize(x, codebook.requires_grad_(), backend=backend).codebook_loss
    (found,) = torch.autograd.grad(loss, codebook)
    expected = (2 / 40 * (codebook[0].double() - 1)).half()
    torch.testing.assert_close(found[0], expected.detach())


def test_the_rotation_takes_x_to_its_code() -> None:
    """Along x itself the gradient is that of the scaling: dx.x = g.q."""
    x, codebook, g = torch.randn(3, 20, 6, dtype=torch.float64)
    x.requires_grad_()
    out = vq.vector_quantize(x, codebook, gradient="rotation")
    (dx,) = torch.autograd.grad(out.quantized, x, g)
    torch.testing.assert_close((dx * x).sum(1), (g * out.quantized).sum(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_names_and_dtypes(backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, codebook = torch.randn(2, 3, 4).to(dtype), torch.randn(5, 4).to(dtype)
        out = vq.vector_quantize(x, codebook, backend=backend)
        assert out._fields == ("quantized", "indices", "commitment_loss", "codebook_loss")
        assert out.quantized.shape == x.shape
        assert out.quantized.dtype == dtype
        assert out.indices.shape == (2, 3)
        assert out.commitment_loss.shape == out.codebook_loss.shape == ()
        assert out.commitment_loss.dtype == out.codebook_loss.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_survive(backend: str) -> None:
    """Minus zero and the smallest numbers come through as they are."""
    codebook = torch.tensor([[-0.0, 1e-45, 1.0], [2.0, -0.0, 3.0]])
    x = torch.tensor([[0.0, 0.0, 1.0], [2.0, 0.0, 3.0]], requires_grad=True)
    for gradient in GRADIENTS:
        out = vq.vector_quantize(x, codebook, gradient=gradient, backend=backend)
        check_bits(out.quantized.detach(), codebook, out.indices)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_row_has_an_index(backend: str) -> None:
    x = torch.full((3, 2), torch.nan, requires_grad=True)
    codebook = torch.randn(4, 2, requires_grad=True)
    out = vq.vector_quantize(x, codebook, backend=backend)
    assert out.indices.tolist() == [-1, -1, -1]
    assert out.quantized.isnan().all()
    assert out.commitment_loss.item() == out.codebook_loss.item() == 0
    total = out.quantized.sum() + out.commitment_loss + out.codebook_loss
    grads = torch.autograd.grad(total, (x, codebook))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("x", "codebook"),
    [((0, 4), (3, 4)), ((2, 0, 4), (3, 4)), ((3, 0), (2, 0)), ((0, 5, 4), (0, 3, 4))],
)
def test_zero_sizes(backend: str, x: tuple[int, ...], codebook: tuple[int, ...]) -> None:
    rows, codes = torch.randn(x, requires_grad=True), torch.randn(codebook, requires_grad=True)
    out = vq.vector_quantize(rows, codes, backend=backend)
    assert out.quantized.shape == x
    assert out.commitment_loss.item() == out.codebook_loss.item() == 0
    total = out.quantized.sum() + out.commitment_loss + out.codebook_loss
    for grad, leaf in zip(torch.autograd.grad(total, (rows, codes)), (rows, codes), strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_each_gradient_goes_where_it_belongs(backend: str, gradient: str) -> None:
    x = torch.randn(6, 3, requires_grad=True)
    codebook = torch.randn(4, 3, requires_grad=True)
    out = vq.vector_quantize(x, codebook, gradient=gradient, backend=backend)

    def gradients(output: Tensor) -> tuple[bool, bool]:
        found = torch.autograd.grad(
            output.sum(), (x, codebook), retain_graph=True, allow_unused=True
        )
        some = [g is not None and bool(g.abs().sum() > 0) for g in found]
        return some[0], some[1]

    assert gradients(out.quantized) == (True, False)
    assert gradients(out.commitment_loss) == (True, False)
    assert gradients(out.codebook_loss) == (False, True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_are_quantised_alone(backend: str) -> None:
    x, codebook = torch.randn(2, 3, 4, 5), torch.randn(2, 6, 5)
    leaves = x.requires_grad_(), codebook.requires_grad_()
    out = vq.vector_quantize(*leaves, gradient="rotation", backend=backend)
    total = (out.quantized.square()).sum() + out.commitment_loss + out.codebook_loss
    grads = torch.autograd.grad(total, leaves)
    each = [vq.vector_quantize(x[h], codebook[h], gradient="rotation") for h in range(2)]
    assert torch.equal(out.indices, torch.stack([e.indices for e in each]))
    assert torch.equal(out.quantized, torch.stack([e.quantized for e in each]))
    loss = torch.stack([e.commitment_loss for e in each]).mean()
    torch.testing.assert_close(out.commitment_loss, loss)
    total = sum(
        e.quantized.square().sum() + (e.commitment_loss + e.codebook_loss) / 2 for e in each
    )
    for found, expected in zip(grads, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(found, expected)


def test_losses_gradcheck() -> None:
    """Where the choice does not change the losses are smooth in both inputs."""
    x = torch.randn(5, 3, dtype=torch.float64)
    codebook = torch.randn(4, 3, dtype=torch.float64)

    def commitment(rows: Tensor) -> Tensor:
        return vq.vector_quantize(rows, codebook).commitment_loss

    def codes(values: Tensor) -> Tensor:
        return vq.vector_quantize(x, values).codebook_loss

    assert torch.autograd.gradcheck(commitment, x.clone().requires_grad_())
    assert torch.autograd.gradcheck(codes, codebook.clone().requires_grad_())
    assert torch.autograd.gradgradcheck(commitment, x.clone().requires_grad_())


def test_second_derivatives_are_refused() -> None:
    x = torch.randn(5, 3, requires_grad=True)
    loss = vq.vector_quantize(x, torch.randn(4, 3), backend="cpu").commitment_loss
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="gradient of vector_quantize can't be differentiated"):
        grad.sum().backward()


def test_a_codebook_without_gradient_costs_no_sum(
    without_extension: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kexue_kernels.vq import blocked_vector_quantize

    monkeypatch.setattr(blocked_vector_quantize, "segmented", None)
    x = torch.randn(5, 3, requires_grad=True)
    out = vq.vector_quantize(x, torch.randn(4, 3))
    (out.quantized.sum() + out.commitment_loss).backward()
    assert x.grad is not None


def test_determinism() -> None:
    case = Quantize(Data("duplicated", N=3000, K=20, d=8))
    first, second = run(case, make(case), "cpu"), run(case, make(case), "cpu")
    assert all(torch.equal(first[name], second[name]) for name in first)
