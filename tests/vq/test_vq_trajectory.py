"""VectorQuantizer learns as vector-quantize-pytorch's VectorQuantize, from the same weights."""

import pytest
import torch
from torch import Tensor

from kexue_kernels.nn import VectorQuantizer
from kexue_kernels.nn.vq.converters import (
    from_vector_quantize_pytorch,
    to_vector_quantize_pytorch,
)

theirs = pytest.importorskip("vector_quantize_pytorch", reason="the package is not installed")


def batches(count: int, dim: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return list(torch.randn(count, 4, 50, dim, generator=g).unbind())


@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("decay", [0.8, 0.99])
def test_an_averaged_codebook(decay: float, rotation: bool) -> None:
    torch.manual_seed(0)
    other = theirs.VectorQuantize(
        8, 16, decay=decay, commitment_weight=0.5, rotation_trick=rotation
    )
    own = VectorQuantizer(
        8, 16, ema_decay=decay, commitment_weight=0.5, gradient="rotation" if rotation else "ste"
    )
    own.load_state_dict(from_vector_quantize_pytorch(other.state_dict(), own))
    for x in batches(6, 8):
        mine, yours = x.clone().requires_grad_(), x.clone().requires_grad_()
        quantized, indices, loss = own(mine)
        their_quantized, their_indices, their_loss = other(yours)
        assert torch.equal(indices, their_indices)
        torch.testing.assert_close(quantized, their_quantized)
        torch.testing.assert_close(loss, their_loss.view(()))
        (quantized.square().sum() + loss).backward()
        (their_quantized.square().sum() + their_loss.sum()).backward()
        torch.testing.assert_close(mine.grad, yours.grad, rtol=1e-4, atol=1e-5)
    state = to_vector_quantize_pytorch(own)
    for name, value in other.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)


def test_a_learned_codebook() -> None:
    """By the loss alone: their codebook also takes the gradient of what it gave out."""
    torch.manual_seed(0)
    other = theirs.VectorQuantize(
        8, 16, learnable_codebook=True, ema_update=False, commitment_weight=0.5
    )
    own = VectorQuantizer(8, 16, commitment_weight=0.5, codebook_weight=0.5)
    own.load_state_dict(from_vector_quantize_pytorch(other.state_dict(), own))
    mine, yours = (torch.optim.SGD(m.parameters(), lr=0.5) for m in (own, other))
    for x in batches(6, 8):
        for module, optimiser in ((own, mine), (other, yours)):
            optimiser.zero_grad()
            loss = module(x)[2]
            loss.sum().backward()
            optimiser.step()
        state = to_vector_quantize_pytorch(own)
        embed = other.state_dict()["_codebook.embed"]
        torch.testing.assert_close(state["_codebook.embed"], embed, rtol=1e-4, atol=1e-6)
