"""The vq family as registered operators: opcheck, torch.compile, autocast, torch.func."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kexue_kernels as kk
from kexue_kernels import launchers, vq
from tests.vq.cases import METRICS, Data, Quantize, make

ops = torch.ops.kexue_kernels
GRADIENTS = ["ste", "rotation"]
CASES = [
    Quantize(Data("random"), "rotation"),
    Quantize(Data("duplicated", dtype=torch.bfloat16), "ste", "cosine"),
    Quantize(Data("broken"), "rotation", "dot"),
]


@pytest.mark.parametrize("metric", METRICS)
def test_opcheck_search(metric: str) -> None:
    x, codebook = Data("random", N=9, K=5, d=3).make()
    args = (x[None], codebook[None], metric, "exact", "cpu")
    torch.library.opcheck(ops.nearest_codebook.default, args)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_quantize(gradient: str, dtype: torch.dtype) -> None:
    x, codebook = Data("random", N=9, K=5, d=3, dtype=dtype).make()
    indices = vq.nearest_codebook(x, codebook)
    leaves = x.requires_grad_(), codebook.requires_grad_()
    torch.library.opcheck(ops.vector_quantize.default, (*leaves, indices, gradient, "cpu"))
    scale, plain = torch.tensor(0.5), (x.detach(), codebook.detach(), indices)
    for scale_c in (scale, None):
        args = (torch.randn_like(plain[0]), *plain, scale, scale_c, gradient, "cpu")
        torch.library.opcheck(ops.vector_quantize_backward.default, args)


def test_opcheck_statistics() -> None:
    x, indices = torch.randn(9, 3), torch.randint(-1, 4, (9,))
    torch.library.opcheck(ops.codebook_statistics.default, (x, indices, 4, "cpu"))


def loss_of(case: Quantize) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    def loss(x: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        out = vq.vector_quantize(2 * x, codebook, metric=case.metric, gradient=case.gradient)
        counts, sums = vq.codebook_statistics(x, out.indices, codebook.shape[0])
        weighted = out.quantized.nan_to_num().float().square().sum()
        return weighted + out.commitment_loss + 2 * out.codebook_loss, out.indices, counts, sums

    return loss


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_whole(case: Quantize, dynamic: bool) -> None:
    loss = loss_of(case)
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for N in (case.data.N, case.data.N + 3):
        inputs = make(Quantize(Data(**{**vars(case.data), "N": N})))
        leaves = inputs.x.requires_grad_(), inputs.codebook.requires_grad_()
        eager, traced = loss(*leaves), compiled(*leaves)
        for found, expected in zip(traced, eager, strict=True):
            torch.testing.assert_close(found, expected, equal_nan=True)
        grads = (torch.autograd.grad(out[0], leaves) for out in (traced, eager))
        for found, expected in zip(*grads, strict=True):
            torch.testing.assert_close(found, expected)


def test_compiles_with_inductor() -> None:
    case = CASES[0]
    inputs = make(case)
    leaves = inputs.x.requires_grad_(), inputs.codebook.requires_grad_()
    loss = loss_of(case)
    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(compiled(*leaves), loss(*leaves))
    grads = (torch.autograd.grad(f(*leaves)[0], leaves) for f in (compiled, loss))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected)


def test_the_update_compiles_whole() -> None:
    def update(*args: Tensor) -> Tensor:
        return vq.ema_update_(*args, decay=0.9)

    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    states = []
    for f in (compiled, update):
        torch.manual_seed(0)
        running = [torch.randn(5, 3), torch.rand(5), torch.randn(5, 3)]
        f(*running, torch.randn(20, 3), torch.randint(-1, 5, (20,)))
        states.append(running)
    for found, expected in zip(*states, strict=True):
        torch.testing.assert_close(found, expected)


def test_autocast() -> None:
    """Products inside are not rounded; a mix of dtypes is promoted; without autocast it raises."""
    x, codebook = Data("bisector", N=200, K=40, d=16).make()
    expected = vq.nearest_codebook(x, codebook)
    half = x.bfloat16()
    for backend in ("cpu", "reference"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(vq.nearest_codebook(x, codebook, backend=backend), expected)
            leaf = half.clone().requires_grad_()
            out = vq.vector_quantize(leaf, codebook, backend=backend)
            (grad,) = torch.autograd.grad(out.quantized.sum() + out.commitment_loss, leaf)
        assert out.quantized.dtype == torch.float32
        assert grad.dtype == torch.bfloat16
        assert torch.equal(out.indices, vq.nearest_codebook(half.float(), codebook))
    with pytest.raises(ValueError, match="codebook: expected dtype bfloat16, got float32"):
        vq.nearest_codebook(half, codebook)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_vmap(backend: str) -> None:
    x, codebook = torch.randn(3, 6, 4), torch.randn(5, 4)
    x[1, 2] = torch.nan

    def call(rows: Tensor) -> tuple[Tensor, ...]:
        return vq.vector_quantize(rows, codebook, gradient="rotation", backend=backend)

    each = [call(rows) for rows in x]
    for found, expected in zip(torch.vmap(call)(x), zip(*each, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(expected), equal_nan=True)
    found = torch.vmap(lambda rows: vq.nearest_codebook(rows, codebook), in_dims=1)(x)
    assert torch.equal(found, vq.nearest_codebook(x, codebook).T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reference_compiles_whole_and_maps_over_codebooks(dtype: torch.dtype) -> None:
    backend = "auto" if dtype == torch.float64 else "reference"
    x, codebook = torch.randn(3, 6, 4, dtype=dtype), torch.randn(3, 5, 4, dtype=dtype)

    def call(rows: Tensor, codes: Tensor) -> tuple[Tensor, ...]:
        out = kk.vector_quantize(rows, codes, gradient="rotation", backend=backend)
        return *out, *kk.codebook_statistics(rows, out.indices, 5, backend=backend)

    each = [call(*pair) for pair in zip(x, codebook, strict=True)]
    mapped = torch.vmap(call)(x, codebook)
    for found, expected in zip(mapped, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(expected))
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for found, expected in zip(compiled(x[0], codebook[0]), each[0], strict=True):
        torch.testing.assert_close(found, expected)


def test_vmap_over_nothing() -> None:
    found = torch.func.vmap(kk.vector_quantize)(torch.randn(0, 4, 3), torch.randn(0, 5, 3))
    assert [x.shape for x in found] == [(0, 4, 3), (0, 4), (0,), (0,)]


def test_meta_tensors_have_shapes() -> None:
    x, codebook = torch.empty(4, 3, device="meta"), torch.empty(5, 3, device="meta")
    found = kk.vector_quantize(x, codebook)
    counts, sums = kk.codebook_statistics(x, found.indices, 5)
    shapes = [part.shape for part in (found.quantized, found.indices, counts, sums)]
    assert shapes == [(4, 3), (4,), (5,), (5, 3)]
    assert kk.nearest_codebook(x.double(), codebook.double()).shape == (4,)


def test_torch_func() -> None:
    x, codebook = torch.randn(3, 6, 4), torch.randn(5, 4)

    def loss(rows: Tensor, codes: Tensor) -> Tensor:
        out = vq.vector_quantize(rows, codes, gradient="rotation")
        return out.quantized.square().sum() + out.commitment_loss + 3 * out.codebook_loss

    leaves = x[0].clone().requires_grad_(), codebook.clone().requires_grad_()
    plain = torch.autograd.grad(loss(*leaves), leaves)
    found = torch.func.grad(loss, argnums=(0, 1))(x[0], codebook)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b)
    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(0, None))(x, codebook)
    torch.testing.assert_close(per_sample[0], plain[0])


def test_forward_mode_is_refused() -> None:
    x, codebook = torch.randn(6, 4), torch.randn(5, 4)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
        torch.func.jvp(lambda t: vq.vector_quantize(t, codebook).quantized, (x,), (x,))


def test_backward_uses_the_forward_backend() -> None:
    """Were it chosen anew, "cuda" would refuse tensors on CPU."""
    x = torch.randn(4, 3, requires_grad=True)
    with kk.use_backend("cpu"):
        out = vq.vector_quantize(x, torch.randn(5, 3))
    with kk.use_backend("cuda"):
        (grad,) = torch.autograd.grad(out.quantized.sum(), x)
    assert torch.equal(grad, torch.ones_like(x))


def test_only_inputs_are_kept_for_the_backward() -> None:
    x, codebook = torch.randn(8, 3, requires_grad=True), torch.randn(4, 3)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        vq.vector_quantize(x, codebook)
    assert sorted(saved) == [8, 12, 24]


def test_a_backend_without_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "implements", lambda family, op, name: False)
    launchers.launcher.cache_clear()
    x, codebook = torch.randn(4, 3), torch.randn(5, 3)
    for backend in ("triton", "cuda"):
        words = f"nearest_codebook has no {backend} implementation"
        with pytest.raises(kk.BackendUnavailableError, match=words):
            vq.nearest_codebook(x, codebook, backend=backend)
    for backend in ("auto", "cpu"):
        assert launchers.launcher_of("vq", "nearest_codebook", backend, x).__name__.endswith(
            "blocked_nearest_codebook"
        )


def test_what_the_extension_lacks_is_done_in_pytorch(without_extension: None) -> None:
    for op in ("nearest_codebook", "vector_quantize", "codebook_statistics"):
        found = launchers.launcher_of("vq", op, "cpu", torch.zeros(1))
        assert found.__name__ == f"kexue_kernels.vq.blocked_{op}"
