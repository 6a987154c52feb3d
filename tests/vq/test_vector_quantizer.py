"""kk.nn.VectorQuantizer: how the codebook learns, what it reports, state and bad input."""

import copy
import math

import pytest
import torch
from torch import Tensor

from kexue_kernels import vq
from kexue_kernels.nn.vq import VectorQuantizer
from tests.vq.cases import METRICS, nearest

MODES = [{}, {"ema_decay": 0.8}, {"simvq": True}]


def ids(options: dict[str, object]) -> str:
    return "-".join(f"{k}={v}" for k, v in options.items()) or "plain"


@pytest.mark.parametrize("options", MODES, ids=ids)
@pytest.mark.parametrize("gradient", ["ste", "rotation"])
@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_forward(options: dict[str, object], gradient: str, metric: str) -> None:
    layer = VectorQuantizer(6, 9, gradient=gradient, metric=metric, **options)
    x = torch.randn(2, 5, 6, requires_grad=True)
    rows = torch.nn.functional.normalize(x, dim=-1) if metric == "cosine" else x
    codebook = layer.codebook.detach().clone()
    quantized, indices, loss = layer(x)
    assert torch.equal(indices.flatten(), nearest(rows.detach().view(10, 6), codebook, metric))
    assert torch.equal(quantized, codebook[indices])
    squared = (rows - codebook[indices]).square().mean()
    weight = 0.25 if "ema_decay" in options else 1.25
    torch.testing.assert_close(loss, weight * squared)
    (quantized.square().sum() + loss).backward()
    assert x.grad is not None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    assert len(list(layer.parameters())) == (0 if "ema_decay" in options else 1)


def written_out(
    codes: Tensor, size: Tensor, total: Tensor, x: Tensor, decay: float, eps: float = 1e-5
) -> Tensor:
    """One update of all three, in place, code by code; the indices that the old codes gave."""
    indices = nearest(x, codes, "l2")
    for k in range(codes.shape[0]):
        chosen = x[indices == k].double()
        size[k] = decay * size[k] + (1 - decay) * len(chosen)
        total[k] = decay * total[k] + (1 - decay) * chosen.sum(0)
    smoothed = (size + eps) / (size.sum() + len(size) * eps) * size.sum()
    codes.copy_(total / smoothed[:, None])
    return indices


def test_ema_trajectory() -> None:
    """Many steps with an encoder that learns from the commitment loss, against the formulas."""
    torch.manual_seed(0)
    layer = VectorQuantizer(4, 7, ema_decay=0.8, commitment_weight=1.0)
    codes, size, total = (
        t.double().clone() for t in (layer.codes, layer.cluster_size, layer.embed_sum)
    )
    weight = torch.randn(4, 4, requires_grad=True)
    own = weight.detach().double()
    for _ in range(20):
        data = torch.randn(30, 4)
        quantized, indices, loss = layer(data @ weight)
        (grad,) = torch.autograd.grad(quantized.square().mean() + loss, weight)
        rows = data.double() @ own
        before = codes.clone()
        assert torch.equal(indices, written_out(codes, size, total, rows, 0.8))
        q = before[indices]
        d_rows = (2 * q + 2 * (rows - q)) / q.numel()  # straight through, and the commitment
        torch.testing.assert_close(grad.double(), data.double().T @ d_rows, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            weight -= 0.1 * grad
        own -= 0.1 * (data.double().T @ d_rows)
    for found, expected in ((layer.codes, codes), (layer.cluster_size, size)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_backward_sees_the_codes_of_the_forward() -> None:
    """The update in place comes between the two."""
    layer = VectorQuantizer(3, 4, ema_decay=0.0, commitment_weight=1.0)
    x = torch.randn(20, 3, requires_grad=True)
    quantized, _, loss = layer(x)
    before = quantized.detach().clone()
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * (x - before).detach() / x.numel())
    assert not torch.equal(layer.codes, layer.codes.new_tensor(0).expand_as(layer.codes))


def test_evaluation_changes_nothing() -> None:
    layer = VectorQuantizer(3, 4, ema_decay=0.5, dead_code_threshold=2, kmeans_init=True).eval()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    layer(torch.randn(20, 3))
    after = layer.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert 0 < layer.usage <= 1


def test_perplexity_and_usage() -> None:
    layer = VectorQuantizer(1, 4).eval()
    assert math.isnan(layer.perplexity)
    assert layer.usage == 0
    layer.codes.data = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    layer(torch.tensor([[0.1], [0.9], [1.1], [3.0], [torch.nan]]))
    entropy = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert layer.perplexity == pytest.approx(math.exp(entropy))
    assert layer.usage == 0.75
    layer(torch.zeros(5, 1))
    assert layer.perplexity == pytest.approx(1)
    assert layer.usage == 0.25


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_dead_codes_become_rows_of_the_batch(ema_decay: float | None) -> None:
    layer = VectorQuantizer(2, 6, ema_decay=ema_decay, dead_code_threshold=0.9)
    layer.codes.data[:] = torch.tensor([100.0, 100.0])
    layer.codes.data[0] = 0
    x = torch.randn(30, 2)
    x[::3] = torch.nan  # never taken
    _, indices, _ = layer(x)
    assert indices.unique().tolist() == [-1, 0]
    kept = x[x.isfinite().all(1)]
    matches = (layer.codes[1:, None] == kept).all(-1)  # [5, rows]
    assert matches.any(1).all()
    assert matches.any(0).sum() == 5  # all different
    assert torch.equal(layer.cluster_size[1:], torch.full((5,), 0.9))
    if ema_decay is not None:
        torch.testing.assert_close(layer.embed_sum[1:], layer.codes[1:] * 0.9)


def test_more_dead_codes_than_rows() -> None:
    layer = VectorQuantizer(2, 50, ema_decay=0.1, dead_code_threshold=1)
    before = layer.codes.clone()
    x = 5 + torch.randn(3, 2)
    layer(x)
    changed = (layer.codes[:, None] == x).all(-1)
    assert changed.any(0).all()  # each row once
    assert changed.sum() == 3
    assert layer.codes.isfinite().all()
    assert (layer.codes == before).all(1).sum() <= 47
    layer(torch.empty(0, 2))
    layer(torch.full((4, 2), torch.nan))
    assert layer.codes.isfinite().all()


def test_no_collapse_on_clusters() -> None:
    """From a bad start, replacement finds clusters that plain averages never reach."""
    torch.manual_seed(0)
    centres = 10 * torch.randn(8, 4)
    shares = []
    for threshold in (0, 1):
        layer = VectorQuantizer(4, 8, ema_decay=0.8, dead_code_threshold=threshold)
        layer.codes.data += 50
        layer.embed_sum.copy_(layer.codes)
        for _ in range(40):
            layer(centres[torch.randint(8, (64,))] + 0.1 * torch.randn(64, 4))
        shares.append(layer.usage)
    assert shares[0] < 0.5
    assert shares[1] == 1.0


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}], ids=ids)
def test_kmeans_init(options: dict[str, object], metric: str) -> None:
    torch.manual_seed(1)
    centres = torch.nn.functional.normalize(torch.randn(4, 16), dim=1) * 5
    x = centres.repeat(25, 1) + 0.05 * torch.randn(100, 16)
    layer = VectorQuantizer(16, 40, metric=metric, kmeans_init=True, **options)
    assert not layer.initialised
    layer(x)
    assert layer.initialised
    scale = 1 / 5 if metric == "cosine" else 1
    distance = torch.cdist(centres * scale, layer.codebook.detach()).amin(1)
    assert distance.max() < 0.3 * scale
    again = layer.codes.detach().clone()
    layer.eval()(x + 100)
    assert torch.equal(layer.codes, again)


def test_kmeans_with_fewer_rows_than_codes() -> None:
    layer = VectorQuantizer(2, 10, ema_decay=0.5, kmeans_init=True)
    x = torch.randn(4, 2)
    quantized, _, loss = layer(x)
    torch.testing.assert_close(quantized, x)
    assert loss < 1e-10


def test_simvq_moves_every_code() -> None:
    layer = VectorQuantizer(4, 50, simvq=True)
    before, frozen = layer.codebook.detach().clone(), layer.codes.clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    _, indices, loss = layer(torch.randn(3, 4))
    loss.backward()
    optimizer.step()
    assert indices.unique().numel() <= 3
    assert (layer.codebook - before).abs().amax(1).gt(0).all()
    assert torch.equal(layer.codes, frozen)
    torch.testing.assert_close(layer.codebook, frozen @ layer.transform.mT)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("options", [*MODES, {"ema_decay": 0.5, "dead_code_threshold": 1}], ids=ids)
def test_heads(options: dict[str, object], share: bool) -> None:
    layer = VectorQuantizer(6, 5, heads=3, share_codebook=share, **options)
    assert layer.codebook.shape == ((5, 2) if share else (3, 5, 2))
    codebook = layer.codebook.detach().clone()
    x = torch.randn(4, 7, 6)
    quantized, indices, _ = layer(x)
    assert indices.shape == (4, 7, 3)
    for h in range(3):
        own = codebook if share else codebook[h]
        part = x[..., 2 * h : 2 * h + 2]
        assert torch.equal(indices[..., h].flatten(), nearest(part.reshape(28, 2), own, "l2"))
        assert torch.equal(quantized[..., 2 * h : 2 * h + 2], own[indices[..., h]])
    layer.eval()
    quantized, indices, _ = layer(x)
    assert torch.equal(layer.decode(indices), quantized)
    assert layer.last_counts.sum() == 4 * 7 * 3


def test_decode() -> None:
    layer = VectorQuantizer(3, 5).eval()
    quantized, indices, _ = layer(torch.randn(2, 4, 3))
    assert torch.equal(layer.decode(indices), quantized)
    assert layer.decode(torch.tensor([-1])).isnan().all()


@pytest.mark.parametrize("options", [*MODES, {"kmeans_init": True}], ids=ids)
def test_state_dict_round_trip(options: dict[str, object]) -> None:
    first, second = (VectorQuantizer(3, 5, **options) for _ in range(2))
    x = torch.randn(20, 3)
    first(x)
    second.load_state_dict(first.state_dict())
    third = copy.deepcopy(first)
    results = [layer(x) for layer in (first, second, third)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_other_dtypes(dtype: torch.dtype) -> None:
    """They are quantised in the codebook's dtype and returned in their own."""
    layer = VectorQuantizer(3, 5, ema_decay=0.9)
    x = torch.randn(8, 3).to(dtype).requires_grad_()
    quantized, _, loss = layer(x)
    assert quantized.dtype == dtype
    assert loss.dtype == torch.float32
    (quantized.sum() + loss).backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_module_of_another_dtype(dtype: torch.dtype) -> None:
    layer = VectorQuantizer(3, 5, ema_decay=0.9, dead_code_threshold=1, dtype=dtype)
    quantized, _, loss = layer(torch.randn(8, 3).to(dtype))
    assert quantized.dtype == layer.codes.dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == layer.cluster_size.dtype == wide


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("metric", METRICS)
def test_rows_that_are_not_finite_get_no_gradient(metric: str, ema_decay: float | None) -> None:
    layer = VectorQuantizer(3, 5, metric=metric, ema_decay=ema_decay)
    x = torch.randn(4, 3)
    x[1, 0], x[2] = torch.nan, torch.inf
    quantized, indices, loss = layer(x.requires_grad_())
    (quantized.nansum() + loss).backward()
    assert indices[1:3].tolist() == [-1, -1]
    assert x.grad[1:3].count_nonzero() == 0
    assert x.grad[[0, 3]].isfinite().all()
    assert quantized[[0, 3]].isfinite().all()


def test_autocast() -> None:
    layer = VectorQuantizer(16, 50, simvq=True)
    x = torch.randn(100, 16)
    expected = layer(x)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantized, indices, _ = layer(x)
    assert torch.equal(indices, expected)
    assert quantized.dtype == torch.float32


@pytest.mark.parametrize("options", [*MODES, {"dead_code_threshold": 1}], ids=ids)
def test_compiles_whole(options: dict[str, object]) -> None:
    layer = VectorQuantizer(4, 6, gradient="rotation", **options)
    other = copy.deepcopy(layer)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(10, 4)
        torch.manual_seed(3)
        expected = layer(x)
        torch.manual_seed(3)
        for a, b in zip(compiled(x), expected, strict=True):
            torch.testing.assert_close(a, b)
    torch.testing.assert_close(other.state_dict(), layer.state_dict())


def test_same_as_the_functions() -> None:
    layer = VectorQuantizer(3, 5, ema_decay=0.7)
    running = [t.clone() for t in (layer.codes, layer.cluster_size, layer.embed_sum)]
    x = torch.randn(20, 3)
    _, indices, _ = layer(x)
    vq.ema_update_(*running, x, indices, decay=0.7)
    for found, expected in zip(
        (layer.codes, layer.cluster_size, layer.embed_sum), running, strict=True
    ):
        assert torch.equal(found, expected)


def test_repr() -> None:
    assert repr(VectorQuantizer(3, 5)) == "VectorQuantizer(3, 5)"
    found = repr(VectorQuantizer(4, 5, ema_decay=0.9, heads=2))
    assert found == "VectorQuantizer(4, 5, ema_decay=0.9, heads=2)"


BAD = [
    ((0, 4), {}, ValueError, "dim: expected at least 1, got 0"),
    ((3, 4.0), {}, TypeError, "codebook_size: expected an int, got float"),
    ((3, 4), {"heads": 2}, ValueError, "heads: expected a divisor of dim = 3, got 2"),
    ((3, 4), {"gradient": "x"}, ValueError, "gradient: expected one of ste, rotation"),
    ((3, 4), {"metric": None}, TypeError, "metric: expected a str"),
    ((3, 4), {"precision": "x"}, ValueError, "precision: expected one of exact, fast"),
    ((3, 4), {"simvq": 1}, TypeError, "simvq: expected a bool, got int"),
    ((3, 4), {"simvq": True, "ema_decay": 0.9}, ValueError, "simvq: its codes are frozen"),
    ((3, 4), {"ema_decay": 1.1}, ValueError, "ema_decay: expected a number from 0 to 1, got 1.1"),
    ((3, 4), {"ema_decay": "1"}, TypeError, "ema_decay: expected a number"),
    ((3, 4), {"commitment_weight": -1}, ValueError, "commitment_weight: .* from 0 on, got -1"),
    ((3, 4), {"dead_code_threshold": math.nan}, ValueError, "dead_code_threshold: .* got nan"),
    ((3, 4), {"dtype": torch.int64}, ValueError, "dtype: expected a real floating dtype"),
    ((3, 4), {"backend": "cudnn"}, ValueError, "backend: expected one of"),
]


@pytest.mark.parametrize(("args", "options", "error", "words"), BAD, ids=lambda v: str(v)[:40])
def test_bad_options(args, options, error, words) -> None:
    with pytest.raises(error, match=words):
        VectorQuantizer(*args, **options)


def test_bad_inputs() -> None:
    layer = VectorQuantizer(4, 5, heads=2)
    for x, error, words in (
        ([1.0], TypeError, "x: expected a torch.Tensor"),
        (torch.randn(2, 3), ValueError, r"x: expected shape \[..., 4\], got \[2, 3\]"),
        (torch.zeros(2, 4).long(), ValueError, "x: expected dtype"),
        (torch.empty(2, 4, device="meta"), ValueError, "x: expected device cpu"),
    ):
        with pytest.raises(error, match=words):
            layer(x)
    with pytest.raises(ValueError, match=r"indices: expected shape \[..., 2\], got \[3\]"):
        layer.decode(torch.zeros(3, dtype=torch.int64))
