"""The monarch family in plain PyTorch: the products as their definitions write them down.

Sizes: x [..., k*p], w1 [k, q, p], w2 [l, s, r] with k*q == l*r, y [..., s*l].
"""

import torch
from torch import Tensor

from kexue_kernels.autocast import without_autocast
from kexue_kernels.checks import state_dtype


@without_autocast
def monarch_matmul(x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None = None) -> Tensor:
    """Block-diagonal, permutation, block-diagonal. See `kexue_kernels.monarch_matmul`.

    What passes between the two factors is rounded to x's dtype, as two products would.
    """
    l, s, r = w2.shape
    z = block_diag_matmul(x, w1).unflatten(-1, (r, l))  # l fastest
    y = torch.einsum("lsr,...rl->...sl", _wide(w2), _wide(z))
    return _biased(y.reshape(*x.shape[:-1], s * l), bias).to(x.dtype)


@without_autocast
def block_diag_matmul(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """The first factor alone, [..., k*q]. See `kexue_kernels.block_diag_matmul`."""
    k, q, p = w.shape
    z = torch.einsum("kqp,...kp->...kq", _wide(w), _wide(x.unflatten(-1, (k, p))))
    return _biased(z.reshape(*x.shape[:-1], k * q), bias).to(x.dtype)


@without_autocast
def monarch_to_dense(w1: Tensor, w2: Tensor) -> Tensor:
    """W [s*l, k*p]: the product applied to the identity. See `kexue_kernels.monarch_to_dense`."""
    k, _, p = w1.shape
    identity = torch.eye(k * p, dtype=w1.dtype, device=w1.device)
    return monarch_matmul(identity, w1, w2).mT


@without_autocast
def project_to_monarch(
    weight: Tensor, nblocks: int | tuple[int, int], rank: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest Monarch, from an SVD of each block. See `kexue_kernels.project_to_monarch`.

    With q = l*rank and r = k*rank hidden unit (k, a, l), l fastest, is both the row a*l + l of
    w1's block k and the column k*rank + a of w2's block l, for a = 0 .. rank - 1. So rows
    (s, l) and columns (k, p) of the product are, for each pair (k, l), an s x p matrix

        W[:, l, k, :] = sum over a of w2[l, :, (k, a)] w1[k, (a, l), :]

    of rank at most `rank`, which no other pair has a part in.
    """
    k, l = (nblocks, nblocks) if isinstance(nblocks, int) else nblocks
    out_features, in_features = weight.shape
    s, p = out_features // l, in_features // k
    blocks = _wide(weight).reshape(s, l, k, p).permute(2, 1, 0, 3)  # [k, l, s, p]
    u, sigma, v = torch.linalg.svd(blocks, full_matrices=False)  # s a, a, a p
    u, sigma, v = u[..., :rank], sigma[..., :rank], v[..., :rank, :]
    root = sigma.sqrt()
    w1 = (root[..., None] * v).permute(0, 2, 1, 3).reshape(k, rank * l, p)  # k a l p
    w2 = (u * root[..., None, :]).permute(1, 2, 0, 3).reshape(l, s, k * rank)  # l s k a
    w1, w2 = w1.to(weight.dtype), w2.to(weight.dtype)
    lost = _wide(weight) - monarch_to_dense(_wide(w1), _wide(w2))
    norm = torch.linalg.vector_norm(_wide(weight))
    return w1, w2, torch.where(norm > 0, torch.linalg.vector_norm(lost) / norm, 0.0)


def _biased(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + _wide(bias)


def _wide(x: Tensor) -> Tensor:
    return x.to(state_dtype(x.dtype))
