"""kk.nn.ResidualVQ, kk.nn.FSQ, converters, and quantisers on two ranks."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn

from kexue_kernels import vq
from kexue_kernels.nn.vq import (
    FSQ,
    ResidualVQ,
    VectorQuantizer,
    from_vector_quantize_pytorch,
    to_vector_quantize_pytorch,
)


@pytest.mark.parametrize("gradient", ["ste", "rotation"])
@pytest.mark.parametrize("heads", [1, 2])
def test_residual(gradient: str, heads: int) -> None:
    layer = ResidualVQ(6, 9, 3, gradient=gradient, heads=heads, ema_decay=0.9)
    codebooks = [part.codebook.clone() for part in layer.layers]
    x = torch.randn(2, 5, 6, requires_grad=True)
    quantized, indices, loss = layer(x)
    assert indices.shape == (2, 5, 3) if heads == 1 else (2, 5, 2, 3)
    rest, total, losses = x.detach(), torch.zeros_like(x), torch.zeros(())
    for i, codebook in enumerate(codebooks):
        rows = rest if heads == 1 else rest.view(10, 2, 3).transpose(0, 1)
        out = vq.vector_quantize(rows, codebook)
        q = out.quantized if heads == 1 else out.quantized.transpose(0, 1).reshape(x.shape)
        chosen = out.indices if heads == 1 else out.indices.mT.reshape(2, 5, 2)
        assert torch.equal(indices[..., i], chosen)
        rest, total, losses = rest - q, total + q, losses + 0.25 * out.commitment_loss
    torch.testing.assert_close(quantized, total)
    torch.testing.assert_close(loss, losses)
    layer.eval()
    quantized, indices, _ = layer(x)
    torch.testing.assert_close(layer.decode(indices), quantized)


def test_residual_gradient_reaches_x_once() -> None:
    layer = ResidualVQ(4, 9, 3).eval()
    x, g = torch.randn(10, 4, requires_grad=True), torch.randn(10, 4)
    quantized, _, loss = layer(x)
    (through,) = torch.autograd.grad(quantized, x, g, retain_graph=True)
    assert torch.equal(through, g)
    (of_loss,) = torch.autograd.grad(loss, x)
    rest, expected = x.detach(), torch.zeros_like(x)
    for part in layer.layers:
        q = part(rest)[0].detach()
        rest = rest - q
        expected += 0.25 * 2 * rest / x.numel()
    torch.testing.assert_close(of_loss, expected)


def test_residual_rotation_is_that_of_the_sum() -> None:
    layer = ResidualVQ(4, 9, 2, gradient="rotation").eval()
    x, g = torch.randn(10, 4, requires_grad=True), torch.randn(10, 4)
    quantized, _, _ = layer(x)
    (found,) = torch.autograd.grad(quantized, x, g)
    for n in range(10):  # the sum as the one code of a codebook
        row = x[n : n + 1].detach().requires_grad_()
        out = vq.vector_quantize(row, quantized[n : n + 1].detach(), gradient="rotation")
        (expected,) = torch.autograd.grad(out.quantized, row, g[n : n + 1])
        torch.testing.assert_close(found[n : n + 1], expected)


def test_residual_leaves_less_with_each_quantizer() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 4)
    left = []
    for n in (1, 2, 4):
        layer = ResidualVQ(4, 16, n, ema_decay=0.8, kmeans_init=True)
        for _ in range(5):
            quantized, _, _ = layer(x)
        left.append((x - quantized).square().mean().item())
    assert left[0] > 1.5 * left[1] > 2 * left[2]


def test_residual_rows_that_are_not_finite() -> None:
    layer = ResidualVQ(3, 4, 2, gradient="rotation")
    x = torch.randn(4, 3)
    x[1, 0] = torch.inf
    x.requires_grad_()
    quantized, indices, loss = layer(x)
    assert indices[1].tolist() == [-1, -1]
    assert quantized[1].isnan().all()
    (quantized[[0, 2, 3]].sum() + loss).backward()
    assert x.grad is not None
    assert x.grad[1].tolist() == [0, 0, 0]
    assert x.grad.isfinite().all()


def test_residual_bad_input() -> None:
    with pytest.raises(ValueError, match="num_quantizers: expected at least 1, got 0"):
        ResidualVQ(3, 4, 0)
    with pytest.raises(ValueError, match=r"indices: expected shape \[..., 2\], got \[5, 3\]"):
        ResidualVQ(3, 4, 2).decode(torch.zeros(5, 3, dtype=torch.int64))


@pytest.mark.parametrize("symmetric", [False, True])
def test_fsq_module(symmetric: bool) -> None:
    layer = FSQ([8, 5, 4], preserve_symmetry=symmetric)
    x = torch.randn(2, 7, 3, requires_grad=True)
    quantized, indices, loss = layer(x)
    expected = vq.fsq(x, [8, 5, 4], preserve_symmetry=symmetric)
    assert torch.equal(quantized, expected[0])
    assert torch.equal(indices, expected[1])
    assert loss.item() == 0
    assert layer.codebook_size == 160
    torch.testing.assert_close(layer.decode(indices), quantized)
    every = layer.decode(torch.arange(160))
    assert every.unique(dim=0).shape == (160, 3)
    assert layer.decode(torch.tensor(-1)).isnan().all()


def test_fsq_module_projects() -> None:
    layer = FSQ((3, 3), dim=5)
    x = torch.randn(4, 5, requires_grad=True)
    quantized, indices, _ = layer(x)
    assert quantized.shape == (4, 5)
    torch.testing.assert_close(layer.decode(indices), quantized)
    quantized.sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None for p in layer.parameters())
    with pytest.raises(ValueError, match=r"x: expected shape \[..., 5\], got \[4, 2\]"):
        layer(torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"levels\[0\]: expected at least 2"):
        FSQ([1])
    assert repr(FSQ((3, 3))).startswith("FSQ(\n  (3, 3)")


def their_state(prefix: str = "", heads: int = 1) -> dict[str, Tensor]:
    """The state of their VectorQuantize(dim=4 * heads, codebook_size=6)."""
    embed = torch.randn(heads, 6, 4)
    return {
        f"{prefix}_codebook.initted": torch.tensor(True),
        f"{prefix}_codebook.cluster_size": torch.rand(heads, 6),
        f"{prefix}_codebook.embed_avg": 2 * embed,
        f"{prefix}_codebook.embed": embed,
    }


@pytest.mark.parametrize("heads", [1, 2])
def test_converters_round_trip(heads: int) -> None:
    theirs = their_state(heads=heads)
    layer = VectorQuantizer(4 * heads, 6, heads=heads, ema_decay=0.8)
    layer.load_state_dict(from_vector_quantize_pytorch(theirs, layer))
    assert torch.equal(layer.codes, theirs["_codebook.embed"].view(layer.codes.shape))
    assert torch.equal(layer.embed_sum, 2 * layer.codes)
    back = to_vector_quantize_pytorch(layer)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[k], v) for k, v in theirs.items())


def test_converters_of_a_residual_and_a_learned_codebook() -> None:
    theirs = their_state("layers.0.") | their_state("layers.1.")
    layer: nn.Module = ResidualVQ(4, 6, 2, ema_decay=0.8)
    layer.load_state_dict(from_vector_quantize_pytorch(theirs, layer))
    back = to_vector_quantize_pytorch(layer)
    assert all(torch.equal(back[k], v) for k, v in theirs.items())
    layer = VectorQuantizer(4, 6)
    theirs = their_state()
    layer.load_state_dict(from_vector_quantize_pytorch(theirs, layer))
    back = to_vector_quantize_pytorch(layer)
    assert torch.equal(back["_codebook.embed"], theirs["_codebook.embed"])
    assert torch.equal(back["_codebook.embed_avg"], theirs["_codebook.embed"])
    assert torch.equal(back["_codebook.cluster_size"], torch.ones(1, 6))


def test_converters_refuse_what_they_cannot_place() -> None:
    layer = VectorQuantizer(4, 6, ema_decay=0.8)
    with pytest.raises(ValueError, match=r"state_dict: can't place 'project_in\.weight'"):
        from_vector_quantize_pytorch({"project_in.weight": torch.ones(1)}, layer)
    with pytest.raises(ValueError, match=r"state_dict: .* shape \[6\], got \[2, 6\]"):
        from_vector_quantize_pytorch(their_state(heads=2), layer)
    with pytest.raises(ValueError, match="module: simvq has no counterpart"):
        to_vector_quantize_pytorch(VectorQuantizer(4, 6, simvq=True))
    with pytest.raises(ValueError, match="module: expected a VectorQuantizer or a ResidualVQ"):
        to_vector_quantize_pytorch(nn.Linear(2, 2))


OPTIONS = [
    {"ema_decay": 0.8},
    {"ema_decay": 0.8, "dead_code_threshold": 1.0, "kmeans_init": True},
    {"dead_code_threshold": 1.0},
]


def _batches(rank: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    return [b[rank::2] for b in torch.randn(3, 60, 4, generator=g).unbind()]


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    found = []
    for options in OPTIONS:
        torch.manual_seed(0)
        layer = VectorQuantizer(4, 16, **options)  # type: ignore[arg-type]
        torch.manual_seed(100 + rank)  # what is drawn later differs between ranks
        for batch in _batches(rank):
            layer(batch)
        found.append({**layer.state_dict(), "counts": layer.last_counts})
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_are_as_one(tmp_path: Path) -> None:
    """Same codebooks on both; without drawn rows, those of one process with all the data."""
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[k], other[k]) for k in one)
        assert one["counts"].sum() == 60
    torch.manual_seed(0)
    alone = VectorQuantizer(4, 16, **OPTIONS[0])  # type: ignore[arg-type]
    for parts in zip(_batches(0), _batches(1), strict=True):
        alone(torch.cat(parts))
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(first[0][name], value)
    replaced = first[1]["codes"]
    assert replaced.unique(dim=0).shape == (16, 4)
