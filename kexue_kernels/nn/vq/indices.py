"""Checks of the indices that quantisers decode."""

import torch

from kexue_kernels import checks
from kexue_kernels.vq.arguments import indices_in_range


def check(indices: object, num_codes: int, last: tuple[int, ...] = ()) -> None:
    """Integers [..., *last] from -1 to num_codes - 1: values are read on CPU, where eager."""
    checks.tensor("indices", indices)
    assert isinstance(indices, torch.Tensor)
    checks.dtype("indices", indices, checks.INDEX)
    if last and indices.shape[-1:] != last:
        raise ValueError(f"indices: expected shape [..., {last[0]}], got {list(indices.shape)}")
    if not torch.compiler.is_compiling():
        indices_in_range(indices, num_codes)
