"""Known transforms as Monarchs: what an FFT computes in log n steps, in two dense ones."""

import math

import torch
from torch import Tensor

from kexue_kernels import checks, options

__all__ = ["dft", "hadamard"]

_NORMS = {"backward": 0.0, "ortho": 0.5, "forward": 1.0}  # the power of n divided by


def hadamard(
    n: int,
    nblocks: int | None = None,
    *,
    norm: str = "backward",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The Walsh-Hadamard transform of length n = k p as factors (w1, w2).

    `monarch_matmul(x, w1, w2)` is x H, H symmetric, in Sylvester's (natural) order:
    H_1 = [1], H_2n = [[H_n, H_n], [H_n, -H_n]]. As H_n is the Kronecker product of H_k and H_p,
    every block of w1 is H_p and every block of w2 is H_k.

    Args:
        n: a power of two.
        nblocks: k, a divisor of n; by default the smaller of the two next to sqrt(n).
        norm: "backward" leaves entries of 1 and -1; "ortho" divides by sqrt(n), which makes H
            its own inverse; "forward" divides by n.
        dtype: floating, real or complex.

    Returns:
        w1 [k, p, p] and w2 [p, k, k].

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an n that is no power of two, an nblocks that doesn't divide it, an unknown
            norm or a dtype that is not floating, named.
    """
    k, p = _split(n, nblocks)
    if n & (n - 1):
        raise ValueError(f"n: expected a power of two, got {n}")
    scale = _scale(n, norm)
    _check_dtype(dtype, checks.FLOATING)
    device = torch.get_default_device() if device is None else device
    with torch.device("cpu"):
        w1, w2 = (scale * _sylvester(p)).expand(k, p, p), _sylvester(k).expand(p, k, k)
    return w1.to(device, dtype).contiguous(), w2.to(device, dtype).contiguous()


def dft(
    n: int,
    nblocks: int | None = None,
    *,
    inverse: bool = False,
    norm: str = "backward",
    dtype: torch.dtype = torch.complex64,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The discrete Fourier transform of length n = k p: (w1, w2, permutation).

    `monarch_matmul(x[..., permutation], w1, w2)` is `torch.fft.fft(x)`, or `ifft`. One step of
    Cooley and Tukey: the permutation gathers every k-th element, so that block i is
    x[i], x[i + k], ...; with w_n = exp(-2 pi i / n),

        X[f + p g] = sum over i < k of w_k^(i g) w_n^(i f) sum over j < p of w_p^(j f) x[i + k j]

    for f < p, g < k: w1[i, f, j] = w_n^(i f) w_p^(j f) and w2[f, g, i] = w_k^(i g).

    Args:
        n: the length, any size.
        nblocks: k, a divisor of n; by default the smaller of the two next to sqrt(n) (1 for a
            prime: the dense transform).
        inverse: the inverse transform.
        norm: as in torch.fft: what the inverse ("backward"), both ("ortho") or the other
            direction ("forward") divides by, n or sqrt(n) in all.
        dtype: complex64 or complex128. Entries are exact to its rounding.

    Returns:
        w1 [k, p, p], w2 [p, k, k] and permutation int64 [n].

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an n below 1, an nblocks that doesn't divide it, an unknown norm or a dtype
            that is not complex, named.

    Source: Cooley and Tukey, "An Algorithm for the Machine Calculation of Complex Fourier
    Series" (1965).
    """
    k, p = _split(n, nblocks)
    checks.boolean("inverse", inverse)
    scale = _scale(n, norm)
    if inverse:
        scale = 1 / (n * scale)
    _check_dtype(dtype, checks.COMPLEX)
    sign = 1 if inverse else -1
    device = torch.get_default_device() if device is None else device
    with torch.device("cpu"):
        i, f, j = torch.arange(k), torch.arange(p), torch.arange(p)
        phase = i[:, None, None] * f[:, None] + k * f[:, None] * j  # [k, f, j], of w_n
        w1 = scale * _roots(sign * phase, n)
        w2 = _roots(sign * torch.outer(i, i), k).expand(p, k, k)
    permutation = torch.arange(n, device=device).view(p, k).T.reshape(n)
    return w1.to(device, dtype), w2.to(device, dtype).contiguous(), permutation


def _sylvester(n: int) -> Tensor:
    """[n, n] in float64: -1 where the binary digits that both indices have are odd in number."""
    h = torch.ones(1, 1, dtype=torch.float64)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while h.shape[0] < n:
        h = torch.kron(step, h)
    return h


def _roots(power: Tensor, n: int) -> Tensor:
    """exp(2 pi i power / n) in complex128, its angle reduced before it is rounded."""
    angle = (power % n).double() * (2 * math.pi / n)
    return torch.polar(torch.ones_like(angle), angle)


def _split(n: int, nblocks: int | None) -> tuple[int, int]:
    """(k, p) with k p = n."""
    options.integer("n", n)
    if nblocks is None:
        nblocks = next(k for k in range(math.isqrt(n), 0, -1) if n % k == 0)
    options.integer("nblocks", nblocks)
    if n % nblocks:
        raise ValueError(f"nblocks: expected a divisor of n = {n}, got {nblocks}")
    return nblocks, n // nblocks


def _scale(n: int, norm: str) -> float:
    options.one_of("norm", norm, tuple(_NORMS))
    return float(n) ** -_NORMS[norm]


def _check_dtype(dtype: object, allowed: tuple[torch.dtype, ...]) -> None:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {type(dtype).__name__}")
    if dtype not in allowed:
        names = " or ".join(str(value).removeprefix("torch.") for value in allowed)
        raise ValueError(f"dtype: expected {names}, got {str(dtype).removeprefix('torch.')}")
