"""HiPPO: state matrices that remember their input's history, and four ways to discretise them."""

import torch
from torch import Tensor

from kexue_kernels import checks

__all__ = ["discretize", "legs", "legt"]


def legs(n: int) -> tuple[Tensor, Tensor]:
    """LegS: (A [n, n], B [n]) in float64, for x'(t) = (A x(t) + B u(t)) / t.

    x(t) holds the coefficients of u on [0, t] in the Legendre polynomials, each scaled to a
    unit mean square: the whole history, weighted evenly. S4 uses the pair without the 1 / t, as
    x' = A x + B u; then x remembers with weight exp(-age).

        A_ij = -sqrt((2i + 1)(2j + 1)) for i > j,  -(i + 1) for i = j,  else 0;  B_i = sqrt(2i + 1)

    Raises:
        TypeError: n is not an int.
        ValueError: n is below 1.

    Source: Gu et al., "HiPPO: Recurrent Memory with Optimal Polynomial Projections" (2020),
    theorem 2.
    """
    scale = _scale(n)
    A = -torch.outer(scale, scale).tril(-1)
    return A - torch.diag(torch.arange(1, n + 1, dtype=torch.float64)), scale


def legt(n: int) -> tuple[Tensor, Tensor]:
    """LegT with a window of 1: (A [n, n], B [n]) in float64, for x' = A x + B u.

    x(t) holds u on [t - 1, t] in the Legendre polynomials, each scaled to a unit mean square;
    what is older is forgotten (exactly so as n grows). For a window of w divide A and B by w.

        A_ij = -sqrt((2i + 1)(2j + 1)) * (1 if j <= i else (-1)^(i - j));  B_i = sqrt(2i + 1)

    Raises:
        TypeError: n is not an int.
        ValueError: n is below 1.

    Source: Gu et al. (2020), theorem 1 and appendix D.
    """
    scale = _scale(n)
    i = torch.arange(n)
    sign = 1.0 - 2.0 * ((i[:, None] - i) % 2)  # (-1)^(i - j)
    lower = torch.ones(n, n, dtype=torch.float64).tril()
    return -torch.outer(scale, scale) * (lower + sign.triu(1)), scale


def discretize(
    A: Tensor, B: Tensor, dt: float | Tensor, method: str = "zoh"
) -> tuple[Tensor, Tensor]:
    """(dA, dB) with x_k = dA x_{k-1} + dB u_k, for x' = A x + B u sampled every dt.

    Args:
        A: [n, n]; float32, float64, complex64 or complex128.
        B: [n], or [n, m] for m inputs; of A's dtype.
        dt: the step, a number or a tensor of any shape (...): one discretisation for each.
        method: with I the identity and all of u_k's step weighted alike,
            "forward" (Euler): dA = I + dt A, dB = dt B;
            "backward" (Euler): dA = (I - dt A)^-1, dB = dA dt B;
            "bilinear" (trapezoid): dA = (I - dt A / 2)^-1 (I + dt A / 2),
            dB = (I - dt A / 2)^-1 dt B;
            "zoh": dA = exp(dt A), dB = the integral of exp(s A) B over s in [0, dt]: exact for
            a u that is constant during a step. It needs no inverse: A may be singular.

    Returns:
        dA [..., n, n] and dB [..., n] ([..., n, m]), in A's dtype; differentiable in A, B, dt.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a shape, dtype, device or method that doesn't fit, named.

    Source: Gu et al. (2020), appendix B.3; zoh by the exponential of [[A, B], [0, 0]], Van Loan,
    "Computing integrals involving the matrix exponential" (1978).
    """
    _check(A, B, dt, method)
    step = torch.as_tensor(dt, dtype=A.real.dtype, device=A.device)[..., None, None]
    drive = B if B.ndim == 2 else B[:, None]  # [n, m]
    dA, dB = _METHODS[method](step * A, step * drive)
    return dA, dB if B.ndim == 2 else dB.squeeze(-1)


def _forward(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return _identity(A) + A, B


def _backward(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    identity = _identity(A)
    return _solve(identity - A, identity.expand(A.shape), B)


def _bilinear(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    identity = _identity(A)
    return _solve(identity - A / 2, identity + A / 2, B)


def _zoh(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    n, m = B.shape[-2:]
    joined = torch.nn.functional.pad(torch.cat((A, B), dim=-1), (0, 0, 0, m))
    found = torch.linalg.matrix_exp(joined)
    return found[..., :n, :n], found[..., :n, n:]


def _solve(matrix: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """matrix^-1 times two right-hand sides, factorised once."""
    found = torch.linalg.solve(matrix, torch.cat((left, right), dim=-1))
    n = matrix.shape[-1]
    return found[..., :n], found[..., n:]


_METHODS = {"forward": _forward, "backward": _backward, "bilinear": _bilinear, "zoh": _zoh}


def _identity(A: Tensor) -> Tensor:
    return torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)


def _scale(n: int) -> Tensor:
    """sqrt(2i + 1): what gives the Legendre polynomial of degree i a unit mean square."""
    if not isinstance(n, int) or isinstance(n, bool):
        raise TypeError(f"n: expected an int, got {type(n).__name__}")
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    return (2 * torch.arange(n, dtype=torch.float64) + 1).sqrt()


def _check(A: Tensor, B: Tensor, dt: float | Tensor, method: str) -> None:
    checks.tensor("A", A)
    checks.dtype("A", A, (torch.float32, torch.float64, torch.complex64, torch.complex128))
    if A.ndim != 2 or A.shape[0] != A.shape[1]:
        raise ValueError(f"A: expected shape [n, n], got {list(A.shape)}")
    checks.tensor("B", B)
    checks.dtype("B", B, (A.dtype,))
    checks.device("B", B, A.device, "A")
    if B.ndim not in (1, 2) or B.shape[0] != A.shape[0]:
        raise ValueError(f"B: expected shape [n] or [n, m], n = {len(A)}, got {list(B.shape)}")
    if isinstance(dt, Tensor):
        checks.tensor("dt", dt)
        checks.dtype("dt", dt, checks.REAL)
        checks.device("dt", dt, A.device, "A")
    elif not isinstance(dt, int | float) or isinstance(dt, bool):
        raise TypeError(f"dt: expected a number or a torch.Tensor, got {type(dt).__name__}")
    if not isinstance(method, str):
        raise TypeError(f"method: expected a str, got {type(method).__name__}")
    if method not in _METHODS:
        raise ValueError(f"method: expected one of {', '.join(_METHODS)}, got {method!r}")
