"""Checks that the functions of the vq family share."""

import torch
from torch import Tensor

from kexue_kernels import autocast, checks
from kexue_kernels.options import integer as integer
from kexue_kernels.options import number as number
from kexue_kernels.options import one_of as one_of

METRICS = ("l2", "cosine", "dot")
PRECISIONS = ("exact", "fast")
GRADIENTS = ("ste", "rotation")


def rows_and_codes(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """x and codebook, after checking them; in one dtype where autocast left them in two."""
    checks.tensor("x", x)
    checks.tensor("codebook", codebook)
    if autocast.enabled(x.device.type):
        x, codebook = autocast.promoted(x, codebook)
    checks.dtype("x", x, checks.REAL)
    checks.dtype("codebook", codebook, (x.dtype,))
    checks.device("codebook", codebook, x.device, "x")
    _check_shapes(x, codebook)
    return x, codebook


def _check_shapes(x: Tensor, codebook: Tensor) -> None:
    if codebook.ndim not in (2, 3):
        raise ValueError(
            f"codebook: expected shape [K, d] or [H, K, d], got {list(codebook.shape)}"
        )
    heads, (K, d) = codebook.shape[:-2], codebook.shape[-2:]
    if K < 1:
        raise ValueError(f"codebook: expected at least one code, got {list(codebook.shape)}")
    axes = "[H, ..., d]" if heads else "[..., d]"
    if x.ndim < 1 + len(heads) or x.shape[-1] != d or x.shape[: len(heads)] != heads:
        raise ValueError(
            f"x: expected shape {axes} beside codebook's {list(codebook.shape)}, "
            f"got {list(x.shape)}"
        )


def indices_of(x: Tensor, indices: Tensor) -> None:
    """x [..., d] and an index for each of its rows."""
    checks.tensor("x", x)
    checks.tensor("indices", indices)
    checks.dtype("x", x, checks.REAL)
    if x.ndim < 1:
        raise ValueError("x: expected shape [..., d], got []")
    checks.dtype("indices", indices, checks.INDEX)
    checks.shape("indices", indices, tuple(x.shape[:-1]), "x.shape[:-1]")
    checks.device("indices", indices, x.device, "x")


def indices_in_range(indices: Tensor, num_codes: int) -> None:
    """Reads the values: on CPU, where that needs no synchronisation."""
    if indices.device.type != "cpu" or indices.numel() == 0:
        return
    least, most = (int(x) for x in torch.aminmax(indices))
    if least < -1 or most >= num_codes:
        wrong = least if least < -1 else most
        raise ValueError(f"indices: expected values from -1 to {num_codes - 1}, got {wrong}")
