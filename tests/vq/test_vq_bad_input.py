"""Each bad call raises before anything runs, naming the argument, what was expected, what came."""

import pytest
import torch

import kexue_kernels as kk
from kexue_kernels import vq

x, codes = torch.randn(4, 3), torch.randn(5, 3)
rows = torch.tensor([0, 1, 2, -1])
meta = {"device": "meta"}

PAIRS = [
    ((None, codes), {}, TypeError, "x: expected a torch.Tensor, got NoneType"),
    ((x, [1.0]), {}, TypeError, "codebook: expected a torch.Tensor, got list"),
    ((x.to_sparse(), codes), {}, TypeError, "x: expected a dense tensor"),
    ((x, codes[0]), {}, ValueError, r"codebook: expected shape \[K, d\] or \[H, K, d\], got \[3\]"),
    ((x, codes[None, None]), {}, ValueError, r"codebook: .* got \[1, 1, 5, 3\]"),
    ((x, codes[:0]), {}, ValueError, r"codebook: expected at least one code, got \[0, 3\]"),
    ((x, codes[None, :0]), {}, ValueError, r"codebook: expected at least one code"),
    ((x, codes[:, :2]), {}, ValueError, r"x: expected shape \[..., d\] .* \[5, 2\], got \[4, 3\]"),
    ((x.sum(), codes), {}, ValueError, r"x: expected shape \[..., d\] .* got \[\]"),
    ((x, codes.expand(2, 5, 3)), {}, ValueError, r"x: expected shape \[H, ..., d\] .* \[4, 3\]"),
    ((x[0], codes[None]), {}, ValueError, r"x: expected shape \[H, ..., d\] .* got \[3\]"),
    ((x.long(), codes.long()), {}, ValueError, "x: expected dtype float32 or .* got int64"),
    ((x.cfloat(), codes.cfloat()), {}, ValueError, "x: expected dtype .* got complex64"),
    ((x, codes.half()), {}, ValueError, "codebook: expected dtype float32, got float16"),
    ((x.double(), codes), {}, ValueError, "codebook: expected dtype float64, got float32"),
    ((x, torch.empty(5, 3, **meta)), {}, ValueError, r"codebook: expected device cpu \(x's\)"),
    ((x, codes), {"metric": "l1"}, ValueError, "metric: expected one of l2, cosine, dot, got 'l1'"),
    ((x, codes), {"metric": 2}, TypeError, "metric: expected a str, got int"),
    ((x, codes), {"precision": "tf32"}, ValueError, "precision: expected one of exact, fast"),
    ((x, codes), {"backend": "cudnn"}, ValueError, "backend: expected one of auto, .* 'cudnn'"),
    ((x, codes), {"backend": 3}, TypeError, "backend: expected a str, got int"),
]
STATISTICS = [
    ((None, rows, 5), TypeError, "x: expected a torch.Tensor"),
    ((x, [0], 5), TypeError, "indices: expected a torch.Tensor, got list"),
    ((x.int(), rows, 5), ValueError, "x: expected dtype float32 .* got int32"),
    ((x, rows.float(), 5), ValueError, "indices: expected dtype int32 or int64, got float32"),
    ((x, rows[:3], 5), ValueError, r"indices: .* = \[4\], got \[3\]"),
    ((x.sum(), rows.sum(), 5), ValueError, r"x: expected shape \[..., d\], got \[\]"),
    ((x, torch.empty(4, dtype=torch.int64, **meta), 5), ValueError, "indices: expected device cpu"),
    ((x, rows, 0), ValueError, "num_codes: expected at least 1, got 0"),
    ((x, rows, 2.0), TypeError, "num_codes: expected an int, got float"),
    ((x, rows, True), TypeError, "num_codes: expected an int, got bool"),
    ((x, rows, 2), ValueError, "indices: expected values from -1 to 1, got 2"),
    ((x, rows - 1, 5), ValueError, "indices: expected values from -1 to 4, got -2"),
]
size, total = torch.ones(5), torch.ones(5, 3)
UPDATE = [
    ((None, size, total, x, rows), {}, TypeError, "codebook: expected a torch.Tensor"),
    ((codes, 1.0, total, x, rows), {}, TypeError, "cluster_size: expected a torch.Tensor"),
    ((codes[0], size, total, x, rows), {}, ValueError, r"codebook: expected shape \[K, d\]"),
    ((codes[:0], size, total, x, rows), {}, ValueError, "codebook: expected at least one code"),
    (
        (codes, size[1:], total, x, rows),
        {},
        ValueError,
        r"cluster_size: .* \[K\] = \[5\], got \[4\]",
    ),
    (
        (codes, size, total[:, 1:], x, rows),
        {},
        ValueError,
        r"embed_sum: .* = \[5, 3\], got \[5, 2\]",
    ),
    (
        (codes, size, total[:1].expand(5, 3), x, rows),
        {},
        ValueError,
        "embed_sum: expected memory of its own",
    ),
    ((codes, size.half(), total, x, rows), {}, ValueError, "cluster_size: expected dtype float32"),
    ((codes.half(), size, total.half(), x, rows), {}, ValueError, "embed_sum: .* float32"),
    ((codes, size, total, x[:, 1:], rows), {}, ValueError, r"x: expected shape .* got \[4, 2\]"),
    ((codes, size, total, x.double(), rows), {}, ValueError, "x: expected dtype .* got float64"),
    ((codes, size, total, x, rows + 3), {}, ValueError, "indices: expected values from -1 to 4"),
    ((codes, size, total, x, rows), {"decay": 1.5}, ValueError, "decay: .* 0 to 1, got 1.5"),
    ((codes, size, total, x, rows), {"decay": "1"}, TypeError, "decay: expected a number, got str"),
    ((codes, size, total, x, rows), {"eps": -1.0}, ValueError, "eps: .* from 0 on, got -1.0"),
    ((codes, size, total, x, rows), {"eps": None}, TypeError, "eps: expected a number"),
]
BACKENDS = ["auto", "reference", "cpu"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", [vq.nearest_codebook, vq.vector_quantize])
@pytest.mark.parametrize(
    ("args", "options", "error", "words"),
    PAIRS,
    ids=lambda v: v[:30] if isinstance(v, str) else None,
)
def test_bad_pairs(op, args, options, error, words, backend: str) -> None:
    with pytest.raises(error, match=words):
        op(*args, **{"backend": backend, **options})


@pytest.mark.parametrize(
    ("value", "error"), [("st", ValueError), (None, TypeError)], ids=["unknown", "kind"]
)
def test_bad_gradient(value, error) -> None:
    with pytest.raises(error, match="gradient: expected"):
        vq.vector_quantize(x, codes, gradient=value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("args", "error", "words"), STATISTICS, ids=lambda v: v[:30] if isinstance(v, str) else None
)
def test_bad_statistics(args, error, words, backend: str) -> None:
    with pytest.raises(error, match=words):
        vq.codebook_statistics(*args, backend=backend)


@pytest.mark.parametrize(
    ("args", "options", "error", "words"),
    UPDATE,
    ids=lambda v: v[:30] if isinstance(v, str) else None,
)
def test_bad_update(args, options, error, words) -> None:
    before = [t.clone() for t in (codes, size, total)]
    with pytest.raises(error, match=words):
        vq.ema_update_(*args, **{"decay": 0.9, **options})
    assert all(torch.equal(a, b) for a, b in zip((codes, size, total), before, strict=True))


def test_doubles_are_the_references() -> None:
    wide = x.double(), codes.double()
    for call in (
        lambda: vq.nearest_codebook(*wide, backend="cpu"),
        lambda: vq.vector_quantize(*wide, backend="cpu"),
        lambda: vq.codebook_statistics(wide[0], rows, 5, backend="cpu"),
    ):
        with pytest.raises(kk.BackendUnavailableError, match="served by the reference alone"):
            call()
    assert vq.vector_quantize(*wide).quantized.dtype == torch.float64
    assert vq.codebook_statistics(wide[0], rows, 5)[1].dtype == torch.float64


def test_bad_input_is_named_when_compiling() -> None:
    compiled = torch.compile(vq.nearest_codebook, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="expected at least one code"):
        compiled(x, codes[:0])
