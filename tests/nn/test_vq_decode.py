"""Indices that quantisers decode: what is no code's is refused, on CPU."""

import pytest
import torch
from torch import nn

import kexue_kernels as kk

QUANTISERS = [
    (kk.nn.VectorQuantizer(4, 5), (3,), 5),
    (kk.nn.VectorQuantizer(4, 5, heads=2), (3, 2), 5),
    (kk.nn.ResidualVQ(4, 5, 3), (2, 3), 5),
    (kk.nn.FSQ([4, 3]), (3,), 12),
]


@pytest.mark.parametrize(("layer", "shape", "codes"), QUANTISERS, ids=repr)
def test_out_of_range(layer: nn.Module, shape: tuple[int, ...], codes: int) -> None:
    for wrong in (codes, -2):
        indices = torch.zeros(shape, dtype=torch.int64)
        indices.view(-1)[1] = wrong
        words = f"indices: expected values from -1 to {codes - 1}, got {wrong}"
        with pytest.raises(ValueError, match=words):
            layer.decode(indices)  # type: ignore[operator]
    with pytest.raises(TypeError, match=r"indices: expected a torch\.Tensor, got list"):
        layer.decode([0])  # type: ignore[operator]


def test_decoding_compiles_whole() -> None:
    layer = kk.nn.ResidualVQ(4, 5, 3)
    indices = torch.tensor([[0, 4, 1], [2, 2, -1]])
    compiled = torch.compile(layer.decode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(indices), layer.decode(indices), equal_nan=True)


def test_sync_is_a_bool_or_none() -> None:
    with pytest.raises(TypeError, match="sync: expected a bool, got str"):
        kk.nn.VectorQuantizer(4, 5, sync="all")
