"""RoPE: pairs of channels turned by an angle for each token."""

import torch
from torch import Tensor


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [..., dr] with each pair (x1, x2) as (x1 cos - x2 sin, x2 cos + x1 sin).

    A pair is channels 2i and 2i + 1 where interleaved, else i and i + dr/2; it stays in place. cos
    and sin are [..., dr/2], or [..., dr] with both halves alike.

    Source: Su et al., "RoFormer" (2021), equation 34.
    """
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    if interleaved:
        first, second = x.unflatten(-1, (half, 2)).unbind(-1)
    else:
        first, second = x[..., :half], x[..., half:]
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
