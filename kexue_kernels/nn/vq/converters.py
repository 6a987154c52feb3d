"""Weights to and from vector-quantize-pytorch: its VectorQuantize and ResidualVQ."""

import torch
from torch import Tensor, nn

from kexue_kernels.nn.vq.vector_quantizer import VectorQuantizer

__all__ = ["from_vector_quantize_pytorch", "to_vector_quantize_pytorch"]

_PART = "_codebook."  # of their modules, which holds all of the state
_NAMES = {  # theirs -> ours
    "embed": "codes",
    "embed_avg": "embed_sum",
    "cluster_size": "cluster_size",
    "initted": "initialised",
}


def from_vector_quantize_pytorch(
    state_dict: dict[str, Tensor], module: nn.Module
) -> dict[str, Tensor]:
    """Their state, as `module.load_state_dict` takes it.

    Args:
        state_dict: of a VectorQuantize, or of a ResidualVQ for a `ResidualVQ`, without
            projections (dim is heads times the codebook's).
        module: the `VectorQuantizer` or `ResidualVQ` it is for; what that does not keep, such
            as running means of a learned codebook, is left out.

    Raises:
        ValueError: a key that is not of such a state, or a tensor that doesn't fit, named.
    """
    own = module.state_dict()
    found = {}
    for key, value in state_dict.items():
        path, part, rest = key.rpartition(_PART)
        if not part or rest not in _NAMES:
            raise ValueError(f"state_dict: can't place {key!r}")
        name = path + _NAMES[rest]
        if name not in own:
            continue
        if value.numel() != own[name].numel():
            raise ValueError(
                f"state_dict: expected {key!r} to fit shape {list(own[name].shape)}, "
                f"got {list(value.shape)}"
            )
        found[name] = value.reshape(own[name].shape)
    return found


def to_vector_quantize_pytorch(module: nn.Module) -> dict[str, Tensor]:
    """The state of a `VectorQuantizer` or `ResidualVQ`, as theirs takes it.

    What a learned codebook does not keep is as they start with: one row a code.

    Raises:
        ValueError: a module that has no counterpart there.
    """
    found = {}
    for prefix, part in module.named_modules():
        if not isinstance(part, VectorQuantizer):
            continue
        if part.simvq:
            raise ValueError("module: simvq has no counterpart in their VectorQuantize")
        path = f"{prefix}." if prefix else ""
        codes = part.codes.detach()
        state = {
            "codes": codes,
            "embed_sum": codes,
            "cluster_size": torch.ones_like(codes[..., 0]),
            **part.state_dict(),
        }
        for theirs, ours in _NAMES.items():
            value = state[ours].detach().clone()
            lacks_groups = value.ndim > 0 and codes.ndim == 2
            found[path + _PART + theirs] = value[None] if lacks_groups else value
    if not found:
        raise ValueError(
            f"module: expected a VectorQuantizer or a ResidualVQ, got {type(module).__name__}"
        )
    return found
