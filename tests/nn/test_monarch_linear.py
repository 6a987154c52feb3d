"""kk.nn.MonarchLinear: what it computes, how it starts, to and from dense layers."""

import math
from typing import Any

import pytest
import torch
from torch import nn

import kexue_kernels as kk
from kexue_kernels.nn import MonarchLinear
from tests.monarch.cases import check_near
from tests.nn.parts import check_as_near, gradients

SHAPES = [  # in, out, options, hidden width
    (12, 20, {}, 12),
    (20, 12, {"bias": False}, 12),
    (16, 18, {"nblocks": (4, 6)}, 24),  # 16 rounded up to what 4 and 6 divide
    (12, 18, {"nblocks": (4, 6), "rank": 2}, 48),
    (16, 16, {"nblocks": (4, 8)}, 16),  # 8 doesn't divide 16 / 4
    (5, 7, {"nblocks": 1}, 5),
    (8, 8, {"nblocks": 8}, 8),
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("in_features", "out_features", "options", "hidden"), SHAPES, ids=str)
def test_shapes_and_values(
    in_features: int, out_features: int, options: dict[str, Any], hidden: int
) -> None:
    layer = MonarchLinear(in_features, out_features, **options)
    k, l = layer.nblocks
    assert layer.w1.shape == (k, hidden // k, in_features // k)
    assert layer.w2.shape == (l, out_features // l, hidden // l)
    assert (layer.bias is not None) == options.get("bias", True)
    assert list(layer.state_dict()) == ["w1", "w2"] + ["bias"] * (layer.bias is not None)
    x = torch.randn(2, 3, in_features)
    y = layer(x)
    assert y.shape == (2, 3, out_features)
    assert torch.equal(y, kk.monarch_matmul(x, layer.w1, layer.w2, layer.bias))
    check_near(layer.to_linear()(x), y)


def test_defaults() -> None:
    layer = MonarchLinear(8, 12)
    assert layer.nblocks == (4, 4)
    assert layer.rank is None
    assert "in_features=8, out_features=12, bias=True, nblocks=(4, 4), rank=None" in repr(layer)
    assert all(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("rank", [None, 2], ids=["full", "rank 2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_starts_with_the_variance_of_a_linear(rank: int | None, dtype: torch.dtype) -> None:
    """Of its entries, and so of its outputs: 1 / (3 in) and 1/3, within 5 deviations."""
    layer = MonarchLinear(512, 768, nblocks=(8, 16), rank=rank, dtype=dtype)
    for factor in (layer.w1, layer.w2):
        real = torch.view_as_real(factor) if factor.is_complex() else factor
        bound = real.abs().max().item()
        assert real.square().mean().item() == pytest.approx(bound**2 / 3, rel=0.05)
        assert real.mean().abs() < 5 * real.std() / math.sqrt(real.numel())
    W = layer.to_linear().weight
    assert W.abs().square().mean().item() == pytest.approx(1 / (3 * 512), rel=0.05)
    y = layer(torch.randn(512, 512, dtype=dtype)) - layer.bias
    assert y.abs().square().mean().item() == pytest.approx(1 / 3, rel=0.05)
    assert layer.bias.abs().square().mean().item() == pytest.approx(1 / (3 * 512), rel=0.2)
    before = layer.w1.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.w1, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(dtype: torch.dtype) -> None:
    layer = MonarchLinear(12, 20, nblocks=(3, 5), rank=2, dtype=dtype)
    x = torch.randn(7, 12).to(dtype).requires_grad_()
    leaves = [x, *layer.parameters()]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found = gradients([layer(x)], leaves)
    with kk.use_backend("reference"):
        plain = gradients([layer(x)], leaves)
    check_as_near(found, plain, gradients([kk.reference.monarch_matmul(*wide)], wide))


@pytest.mark.parametrize(("in_features", "out_features", "options", "hidden"), SHAPES, ids=str)
def test_a_monarch_comes_back_from_its_dense_layer(
    in_features: int, out_features: int, options: dict[str, Any], hidden: int
) -> None:
    layer = MonarchLinear(in_features, out_features, **options, dtype=torch.float64)
    linear = layer.to_linear()
    assert linear.weight.dtype == torch.float64
    again = MonarchLinear.from_linear(linear, nblocks=layer.nblocks, rank=layer.rank)
    assert again.w1.shape == layer.w1.shape
    x = torch.randn(4, in_features, dtype=torch.float64)
    check_near(again(x), layer(x))
    check_near(again.to_linear().weight, linear.weight)


def test_from_linear_is_the_nearest() -> None:
    linear = nn.Linear(12, 20)
    layer = MonarchLinear.from_linear(linear, nblocks=(3, 4), rank=2)
    w1, w2, _ = kk.project_to_monarch(linear.weight.detach(), (3, 4), 2)
    check_near(layer.to_linear().weight, kk.monarch_to_dense(w1, w2))
    assert torch.equal(layer.bias, linear.bias)
    assert layer.bias.data_ptr() != linear.bias.data_ptr()
    full = MonarchLinear.from_linear(linear, nblocks=(3, 4), rank=4)
    check_near(full.to_linear().weight, linear.weight)


def test_from_linear_keeps_dtype_mode_and_absence_of_a_bias() -> None:
    linear = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16).eval()
    layer = MonarchLinear.from_linear(linear)
    assert layer.bias is None
    assert layer.w1.dtype == torch.bfloat16
    assert not layer.training
    assert layer.to_linear().weight.dtype == torch.bfloat16
    assert not layer.to_linear().training


def test_conversions_leave_the_random_numbers_alone() -> None:
    linear = nn.Linear(8, 8)
    before = torch.get_rng_state()
    MonarchLinear.from_linear(linear).to_linear()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_subclass_comes_from_linear() -> None:
    class Mine(MonarchLinear):
        pass

    assert type(Mine.from_linear(nn.Linear(8, 8), nblocks=2, rank=1)) is Mine


def test_state_dict_and_training() -> None:
    layer, other = MonarchLinear(8, 12), MonarchLinear(8, 12)
    other.load_state_dict(layer.state_dict())
    x, target = torch.randn(32, 8), torch.randn(32, 12)
    assert torch.equal(layer(x), other(x))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        loss = (layer(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_autocast_and_compile() -> None:
    layer, x = MonarchLinear(8, 12), torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer.bfloat16()(x.bfloat16()))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    check_near(compiled(x.bfloat16()), layer(x.bfloat16()))


def test_on_the_meta_device() -> None:
    layer = MonarchLinear(8, 12, device="meta")
    assert layer(torch.empty(3, 8, device="meta")).shape == (3, 12)
    assert layer.to_empty(device="cpu").w1.device.type == "cpu"
    made = MonarchLinear.from_linear(nn.Linear(8, 12, device="meta"), rank=1)
    assert made.w1.is_meta
    assert made.w2.shape == (4, 3, 4)
    assert made.to_linear().weight.is_meta


BAD = [
    ((0, 8), {}, ValueError, "in_features: expected at least 1, got 0"),
    ((8, 8.0), {}, TypeError, "out_features: expected an int, got float"),
    ((8, 8, 1), {}, TypeError, "bias: expected a bool, got int"),
    ((8, 10), {}, ValueError, "nblocks: expected l to divide out = 10, got 4"),
    ((10, 8), {}, ValueError, "nblocks: expected k to divide in = 10, got 4"),
    ((8, 12), {"nblocks": (4, 5)}, ValueError, "nblocks: expected l to divide out = 12, got 5"),
    ((8, 8), {"nblocks": 0}, ValueError, "nblocks.* expected at least 1, got 0"),
    ((8, 8), {"nblocks": "4"}, TypeError, "nblocks.* expected an int"),
    ((8, 8), {"rank": 0}, ValueError, "rank: expected at least 1, got 0"),
    ((8, 12), {"rank": 3}, ValueError, "rank: expected at most 2 for blocks 3 x 2, got 3"),
    ((8, 8), {"rank": 1.0}, TypeError, "rank: expected an int, got float"),
    ((8, 8), {"dtype": "float32"}, TypeError, "dtype: expected a torch.dtype, got str"),
    ((8, 8), {"dtype": torch.int32}, ValueError, "dtype: expected a floating dtype"),
]


@pytest.mark.parametrize(("args", "options", "error", "words"), BAD, ids=lambda v: str(v)[:30])
def test_bad_input(args, options, error, words) -> None:
    with pytest.raises(error, match=words):
        MonarchLinear(*args, **options)


def test_bad_conversions_and_calls() -> None:
    with pytest.raises(TypeError, match=r"linear: expected a torch.nn.Linear, got Conv1d"):
        MonarchLinear.from_linear(nn.Conv1d(8, 8, 1))
    with pytest.raises(ValueError, match="nblocks: expected k to divide in = 8, got 3"):
        MonarchLinear.from_linear(nn.Linear(8, 8), nblocks=3)
    with pytest.raises(ValueError, match="rank: expected at most 2"):
        MonarchLinear.from_linear(nn.Linear(8, 8), rank=3)
    broken = nn.Linear(8, 8)
    broken.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="weight: expected finite values"):
        MonarchLinear.from_linear(broken)
    layer = MonarchLinear(8, 12)
    with pytest.raises(ValueError, match=r"x: expected shape \[..., k\*p\] = \[..., 8\]"):
        layer(torch.randn(3, 9))
    with pytest.raises(ValueError, match="w1: expected dtype float64, got float32"):
        layer(torch.randn(3, 8).double())
