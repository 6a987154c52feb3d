"""monarchize: what is replaced, by what, what is left alone and why, and the report."""

import pytest
import torch
from torch import nn

from kexue_kernels.monarch.reference import monarch_to_dense, project_to_monarch
from kexue_kernels.nn import MonarchLinear
from kexue_kernels.nn.monarch.conversion import MonarchReport, monarchize


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def perceptron(dtype: torch.dtype | None = None) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(12, 16, dtype=dtype), nn.ReLU(), nn.Linear(16, 8, bias=False, dtype=dtype)
    )


def reasons(report: MonarchReport) -> dict[str, str]:
    return dict(report.skipped)


def test_layers_become_their_projections() -> None:
    model = perceptron()
    before = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    bias = model[0].bias.detach().clone()
    report = monarchize(model, 4, rank=2)
    assert isinstance(model[0], MonarchLinear)
    assert isinstance(model[2], MonarchLinear)
    assert torch.equal(model[0].bias, bias)
    assert model[2].bias is None
    assert [layer.path for layer in report.converted] == ["0", "2"]
    for place, weight, line in zip((0, 2), before, report.converted, strict=True):
        w1, w2, error = project_to_monarch(weight, 4, 2)
        found = monarch_to_dense(model[place].w1, model[place].w2)
        torch.testing.assert_close(found, monarch_to_dense(w1, w2))
        assert line.relative_error == pytest.approx(error.item(), abs=1e-6)
    x = torch.randn(5, 12)
    model(x).sum().backward()
    assert model[0].w1.grad is not None


def test_counts_written_out() -> None:
    report = monarchize(perceptron(), (2, 4), rank=1)
    first, second = report.converted
    # w1 [2, 4, 6] and w2 [4, 4, 2], bias 16; w1 [2, 4, 8] and w2 [4, 2, 2]
    assert first[2:] == (12 * 16 + 16, 48 + 32 + 16, 2 * 12 * 16, 2 * (48 + 32))
    assert second[2:] == (16 * 8, 64 + 16, 2 * 16 * 8, 2 * (64 + 16))
    assert report.skipped == []


def test_full_blocks_by_default() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    weight = model[0].weight.detach().clone()
    (line,) = monarchize(model, 2).converted  # blocks of 4 x 4, two hidden units for each pair
    assert model[0].w1.shape == (2, 4, 4)
    _, _, error = project_to_monarch(weight, 2, 2)
    assert line.relative_error == pytest.approx(error.item(), abs=1e-6)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64], ids=str
)
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(12, 8, dtype=dtype))
    weight = model[0].weight.detach().clone()
    (line,) = monarchize(model, 2, rank=1).converted
    assert {p.dtype for p in model.parameters()} == {dtype}
    wide = torch.promote_types(dtype, torch.float32)
    lost = weight.to(wide) - monarch_to_dense(model[0].w1.to(wide), model[0].w2.to(wide))
    assert line.relative_error == pytest.approx((lost.norm() / weight.to(wide).norm()).item())


def test_a_frozen_layer_stays_frozen_and_modes_are_kept() -> None:
    model = perceptron().eval()
    model[0].weight.requires_grad_(False)
    monarchize(model, 2)
    assert not model[0].w1.requires_grad
    assert not model[0].w2.requires_grad
    assert model[0].bias.requires_grad
    assert model[2].w1.requires_grad
    assert not model[0].training


def test_filter_sees_paths_and_layers() -> None:
    model = nn.ModuleDict({"body": perceptron(), "head": nn.Linear(8, 4)})
    seen = []

    def body(path: str, layer: nn.Linear) -> bool:
        seen.append((path, layer.out_features))
        return path.startswith("body")

    report = monarchize(model, 4, filter=body)
    assert seen == [("body.0", 16), ("body.2", 8), ("head", 4)]
    assert reasons(report) == {"head": "refused by the filter"}
    assert type(model["head"]) is nn.Linear
    assert isinstance(model["body"][0], MonarchLinear)


def test_layers_that_dont_fit_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 10), nn.Linear(10, 8), nn.Linear(4, 8))
    report = monarchize(model, 4, rank=2)
    assert [layer.path for layer in report.converted] == ["0"]
    assert reasons(report) == {
        "1": "4 blocks don't divide 8 -> 10",
        "2": "4 blocks don't divide 10 -> 8",
        "3": "rank 2 is above that of a block, 1 (4 -> 8)",
    }
    empty = nn.Linear(8, 8)
    empty.weight, empty.in_features = nn.Parameter(torch.empty(8, 0)), 0
    assert reasons(monarchize(nn.Sequential(empty), 4)) == {"0": "has no elements (0 -> 8)"}
    assert reasons(monarchize(nn.Sequential(nn.Linear(9, 9)), (3, 2))) == {
        "0": "(3, 2) blocks don't divide 9 -> 9"
    }


def test_a_layer_in_two_places_stays_one() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.Sequential(shared))
    report = monarchize(model, 2)
    assert model[0] is model[1][0]
    assert isinstance(model[0], MonarchLinear)
    assert [layer.path for layer in report.converted] == ["0"]


def test_a_filter_that_refuses_one_place_leaves_the_layer_in_all() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"body": nn.Sequential(shared), "head": shared})
    report = monarchize(model, 2, filter=lambda path, _: path != "head")
    assert model["head"] is shared
    assert model["body"][0] is shared
    assert reasons(report) == {"body.0": "refused by the filter"}


def test_a_weight_that_others_hold_is_left_alone() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(16, 8), "head": nn.Linear(8, 16)})
    model["head"].weight = model["embedding"].weight
    report = monarchize(model, 2)
    assert reasons(report) == {"head": "shares a parameter with embedding.weight"}
    assert model["head"].weight is model["embedding"].weight
    pair = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    pair[1].weight = pair[0].weight
    assert reasons(monarchize(pair, 2)) == {
        "0": "shares a parameter with 1.weight",
        "1": "shares a parameter with 0.weight",
    }


def test_layers_whose_weight_others_read_are_left_alone() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    report = monarchize(model, 2)
    assert not report.converted
    assert "NonDynamicallyQuantizableLinear" in reasons(report)["self_attn.out_proj"]
    assert "TransformerEncoderLayer" in reasons(report)["linear1"]
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        trained = model(x)
        torch.testing.assert_close(model.eval()(x), trained)


def test_hooks_subclasses_and_meta_layers_are_left_alone() -> None:
    hooked, normed = nn.Linear(8, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    hooked.register_forward_hook(lambda *_: None)
    patched = nn.Linear(8, 8)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    model = nn.Sequential(hooked, normed, nn.Linear(8, 8, device="meta"), patched)
    found = reasons(monarchize(model, 2))
    assert "hooks" in found["0"]
    assert "ParametrizedLinear" in found["1"]
    assert "meta" in found["2"]
    assert "forward" in found["3"]


def test_an_error_names_its_layer_and_changes_nothing() -> None:
    model = perceptron()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite") as caught:
        monarchize(model, 2)
    assert "in the layer 2" in caught.value.__notes__
    assert type(model[0]) is nn.Linear


def test_a_second_time_finds_nothing() -> None:
    model = perceptron()
    monarchize(model, 2)
    assert monarchize(model, 2) == MonarchReport([], [])


def test_report_is_a_table() -> None:
    model = nn.ModuleDict({"body[x]": nn.Linear(64, 64), "head": nn.Linear(64, 10)})
    report = monarchize(model, 4, rank=1)
    text = str(report)
    line = next(line for line in text.splitlines() if "body[x]" in line)
    assert f"{report.converted[0].relative_error:.4f}" in line
    assert "4,160 -> 576 (13.8%)" in line
    assert "8,192 -> 1,024 (12.5%)" in line
    assert "1 converted, 1 skipped" in text
    assert "skipped head: 4 blocks don't divide 64 -> 10" in text
    assert "relative error" in str(MonarchReport([], []))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: monarchize(None, 2), TypeError, ["model", "torch.nn.Module", "NoneType"]),
        (lambda: monarchize(nn.Linear(4, 4), 2), ValueError, ["model", "from_linear"]),
        (lambda: monarchize(perceptron(), 0), ValueError, ["nblocks", "at least 1", "0"]),
        (lambda: monarchize(perceptron(), "2"), TypeError, ["nblocks", "int", "str"]),
        (lambda: monarchize(perceptron(), (2,)), ValueError, ["nblocks", "pair", "(2,)"]),
        (lambda: monarchize(perceptron(), 2, 0), ValueError, ["rank", "at least 1", "0"]),
        (lambda: monarchize(perceptron(), 2, 1.5), TypeError, ["rank", "int", "float"]),
        (lambda: monarchize(perceptron(), 2, 1, "0"), TypeError, ["filter", "callable", "str"]),
    ],
)
def test_bad_input(call: object, error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()  # type: ignore[operator]
    for word in words:
        assert word in str(caught.value)
