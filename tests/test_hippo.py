"""kk.hippo against what the matrices are for, and against exact solutions of x' = A x + B u."""

import math

import pytest
import torch
from numpy.polynomial import legendre
from torch import Tensor
from torch.testing import assert_close

from kexue_kernels import hippo

METHODS = ["forward", "backward", "bilinear", "zoh"]
TIGHT = {"rtol": 1e-9, "atol": 1e-10}


def polynomial(t: Tensor) -> Tensor:
    """Degree 4."""
    return 0.3 - 1.2 * t + 2.0 * t**2 - 0.7 * t**3 + 0.1 * t**4


def coefficients(n: int, start: float, end: float) -> Tensor:
    """Of `polynomial` on [start, end] in unit-mean-square Legendre polynomials: quadrature."""
    nodes, weights = (torch.as_tensor(x) for x in legendre.leggauss(n + 8))
    u = polynomial(start + (end - start) * (nodes + 1) / 2)
    basis = torch.as_tensor(legendre.legvander(nodes.numpy(), n - 1))  # [nodes, n]
    scale = (2 * torch.arange(n, dtype=torch.float64) + 1).sqrt()
    return (u * weights / 2) @ basis * scale


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_matrices_are_the_formulas(n: int):
    for make in (hippo.legs, hippo.legt):
        A, B = make(n)
        assert A.dtype == B.dtype == torch.float64
        assert (A.shape, B.shape) == ((n, n), (n,))
    (S, _), (T, _) = hippo.legs(n), hippo.legt(n)
    for i in range(n):
        for j in range(n):
            both = math.sqrt((2 * i + 1) * (2 * j + 1))
            legs = -both if i > j else -(i + 1) if i == j else 0
            assert S[i, j].item() == pytest.approx(legs, abs=1e-12)
            legt = -both * (1 if j <= i else (-1) ** (i - j))
            assert T[i, j].item() == pytest.approx(legt, abs=1e-12)
        assert hippo.legs(n)[1][i] == hippo.legt(n)[1][i] == math.sqrt(2 * i + 1)


@pytest.mark.parametrize("n", [3, 7])  # less and more than the polynomial has
@pytest.mark.parametrize("t", [0.5, 2.0])
def test_legs_follows_the_coefficients_of_the_whole_history(n: int, t: float):
    A, B = hippo.legs(n)
    h = 1e-3
    later, earlier = (coefficients(n, 0, t + step) for step in (h, -h))
    slope = (later - earlier) / (2 * h)
    u = polynomial(torch.tensor(t, dtype=torch.float64))
    assert_close(t * slope, A @ coefficients(n, 0, t) + B * u, rtol=1e-5, atol=1e-5)


def test_legt_follows_the_coefficients_of_the_window():
    n, t, h = 7, 1.7, 1e-3
    A, B = hippo.legt(n)
    slope = (coefficients(n, t + h - 1, t + h) - coefficients(n, t - h - 1, t - h)) / (2 * h)
    u = polynomial(torch.tensor(t, dtype=torch.float64))
    assert_close(slope, A @ coefficients(n, t - 1, t) + B * u, rtol=1e-5, atol=1e-5)


def test_legs_recurrence_reconstructs_a_polynomial():
    """x_k = discretised LegS with dt = 1/k, as HiPPO runs it, ends at the coefficients."""
    n, steps, end = 5, 4000, 2.0
    A, B = hippo.legs(n)
    k = torch.arange(1, steps + 1, dtype=torch.float64)
    dA, dB = hippo.discretize(A, B, 1 / k, "bilinear")
    u = polynomial(end * (k - 0.5) / steps)
    x = torch.zeros(n, dtype=torch.float64)
    for step in range(steps):
        x = dA[step] @ x + dB[step] * u[step]
    assert_close(x, coefficients(n, 0, end), rtol=2e-3, atol=2e-3)


def test_legt_recurrence_forgets_what_left_the_window():
    n, steps = 24, 200  # steps a window
    dA, dB = hippo.discretize(*hippo.legt(n), 1 / steps, "zoh")
    impulse = dB.clone()
    inside = torch.linalg.matrix_power(dA, steps // 2) @ impulse
    outside = torch.linalg.matrix_power(dA, 2 * steps) @ impulse
    assert outside.norm() < 0.02 * inside.norm()


@pytest.mark.parametrize("make", [hippo.legs, hippo.legt])
@pytest.mark.parametrize("dt", [0.01, 0.3, 2.0])
def test_zoh_is_exact_for_a_constant_input(make, dt: float):
    """x' = A x + B has x(t) = exp(tA) (x0 + A^-1 B) - A^-1 B."""
    A, B = make(6)
    dA, dB = hippo.discretize(A, B, dt, "zoh")
    still = torch.linalg.solve(A, B)
    x0 = torch.linspace(-1, 1, 6, dtype=torch.float64)
    x = x0
    for _ in range(5):
        x = dA @ x + dB
    exact = torch.linalg.matrix_exp(5 * dt * A) @ (x0 + still) - still
    assert_close(x, exact, **TIGHT)


def test_zoh_of_a_singular_matrix():
    """A double integrator: x1' = x2, x2' = u."""
    A = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    B = torch.tensor([0.0, 1.0], dtype=torch.float64)
    dA, dB = hippo.discretize(A, B, 0.5, "zoh")
    assert_close(dA, torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=torch.float64), **TIGHT)
    assert_close(dB, torch.tensor([0.125, 0.5], dtype=torch.float64), **TIGHT)


def test_a_scalar_by_hand():
    a, b, dt = -2.0, 3.0, 0.25
    found = {
        method: hippo.discretize(
            torch.tensor([[a]], dtype=torch.float64),
            torch.tensor([b], dtype=torch.float64),
            dt,
            method,
        )
        for method in METHODS
    }
    expected = {
        "forward": (1 + dt * a, dt * b),
        "backward": (1 / (1 - dt * a), dt * b / (1 - dt * a)),
        "bilinear": ((1 + dt * a / 2) / (1 - dt * a / 2), dt * b / (1 - dt * a / 2)),
        "zoh": (math.exp(dt * a), (math.exp(dt * a) - 1) / a * b),
    }
    for method, (dA, dB) in found.items():
        assert (dA.item(), dB.item()) == pytest.approx(expected[method], rel=1e-12)


@pytest.mark.parametrize(
    ("method", "order"), [("forward", 1), ("backward", 1), ("bilinear", 2), ("zoh", None)]
)
def test_order_of_convergence(method: str, order: int | None):
    """The error after a fixed time falls as dt^order; zoh has none for a constant input."""
    A, B = hippo.legs(3)
    exact = hippo.discretize(A, B, 1.0, "zoh")[1]

    def error(steps: int) -> float:
        dA, dB = hippo.discretize(A, B, 1 / steps, method)
        x = torch.zeros_like(B)
        for _ in range(steps):
            x = dA @ x + dB
        return (x - exact).norm().item()

    if order is None:
        assert error(64) < 1e-12
    else:
        assert math.log2(error(128) / error(256)) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_many_steps_and_inputs_at_once(method: str, dtype: torch.dtype):
    A = hippo.legs(4)[0].to(dtype)
    B = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    dt = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    dA, dB = hippo.discretize(A, B, dt, method)
    assert (dA.shape, dB.shape) == ((2, 3, 4, 4), (2, 3, 4, 2))
    assert dA.dtype == dB.dtype == dtype
    one_A, one_B = hippo.discretize(A, B[:, 1], dt[1, 2].item(), method)
    assert_close(dA[1, 2], one_A)
    assert_close(dB[1, 2, :, 1], one_B)
    assert hippo.discretize(A, B, dt[:0], method)[1].shape == (0, 3, 4, 2)


@pytest.mark.parametrize("method", METHODS)
def test_gradients(method: str):
    A, B = hippo.legt(3)
    inputs = (A.requires_grad_(), B.requires_grad_(), torch.tensor([0.2, 0.7]).double())
    inputs[2].requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: hippo.discretize(*x, method), inputs)


A, B = hippo.legs(3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: hippo.legs(0), ValueError, "n: expected at least 1, got 0"),
        (lambda: hippo.legt(2.0), TypeError, "n: expected an int, got float"),
        (lambda: hippo.discretize(A[:2], B, 0.1), ValueError, r"A: expected shape \[n, n\]"),
        (lambda: hippo.discretize(A, B[:2], 0.1), ValueError, r"B: expected shape \[n\] or"),
        (lambda: hippo.discretize(A, B.float(), 0.1), ValueError, "B: expected dtype float64"),
        (lambda: hippo.discretize(A.half(), B, 0.1), ValueError, "A: expected dtype float32"),
        (lambda: hippo.discretize(A.tolist(), B, 0.1), TypeError, "A: expected a torch.Tensor"),
        (lambda: hippo.discretize(A, B, "0.1"), TypeError, "dt: expected a number"),
        (lambda: hippo.discretize(A, B, A.to(torch.complex64)), ValueError, "dt: expected dtype"),
        (lambda: hippo.discretize(A, B, 0.1, "euler"), ValueError, "method: expected one of"),
        (lambda: hippo.discretize(A, B, 0.1, None), TypeError, "method: expected a str"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
