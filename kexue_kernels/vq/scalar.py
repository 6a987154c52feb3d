"""fsq: quantisation without a codebook, each channel rounded on its own."""

import math
from collections.abc import Sequence

from torch import Tensor

from kexue_kernels import checks
from kexue_kernels.vq import arguments, reference


def fsq(
    x: Tensor, levels: Sequence[int], *, preserve_symmetry: bool = False
) -> tuple[Tensor, Tensor]:
    """Finite scalar quantisation: channel i is bounded and rounded to one of levels[i] values.

    The bound of Mentzer et al., as in vector-quantize-pytorch (eps = 1e-3), with L = levels[i]
    and n kept to L values:

        h = (L - 1) (1 + eps) / 2,    o = 1/2 for even L, else 0
        n = round(tanh(x + atanh(o / h)) h - o),    quantized = n / floor(L / 2)

    With `preserve_symmetry` that of Parker et al., which is odd in x and reaches -1 and 1:

        n = floor((L - 1) (tanh(x) + 1) / 2 + 1/2),    quantized = 2 n / (L - 1) - 1

    Args:
        x: [..., n]; float32, bfloat16, float16 or float64.
        levels: n integers, each at least 2, their product below 2^63.
        preserve_symmetry: the second form.

    Returns:
        quantized [..., n] in [-1, 1], in `x`'s dtype, and indices int64 [...]: the numbers
        whose digits are the channels' levels from the lowest, the first channel counting ones.
        A NaN stays one, and its index is -1.

    Differentiable in `x`: rounding passes the gradient through, the bound does not. Halves are
    computed in float32.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a wrong shape, dtype or value, named.

    Source: Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple" (2023), section 3;
    Parker et al., "Scaling Transformers for Low-Bitrate High-Quality Speech Coding" (2024),
    section 3.2.
    """
    checks.tensor("x", x)
    checks.dtype("x", x, checks.REAL)
    levels = checked_levels(levels)
    checks.boolean("preserve_symmetry", preserve_symmetry)
    if x.ndim < 1 or x.shape[-1] != len(levels):
        raise ValueError(
            f"x: expected shape [..., n] with n = {len(levels)} levels, got {list(x.shape)}"
        )
    return reference.fsq(x, levels, preserve_symmetry=preserve_symmetry)


def checked_levels(levels: object) -> tuple[int, ...]:
    if isinstance(levels, str) or not isinstance(levels, Sequence):
        raise TypeError(f"levels: expected a sequence of ints, got {type(levels).__name__}")
    if not levels:
        raise ValueError("levels: expected at least one level, got none")
    for i, level in enumerate(levels):
        arguments.integer(f"levels[{i}]", level, smallest=2)
    if math.prod(levels) >= 2**63:
        raise ValueError(f"levels: expected a product below 2^63, got {math.prod(levels)}")
    return tuple(levels)
