"""Each bad call raises before anything runs, naming the argument, what was expected, what came."""

import pytest
import torch

import kexue_kernels as kk

x, w1, w2, bias = torch.randn(4, 15), torch.randn(3, 4, 5), torch.randn(6, 7, 2), torch.randn(42)
first = torch.randn(12)
meta = {"device": "meta"}
good = {"x": x, "w1": w1, "w2": w2, "bias": bias}
good_blocks = {"x": x, "w": w1, "bias": first}

MONARCH = [
    ({"x": None}, TypeError, "x: expected a torch.Tensor, got NoneType"),
    ({"w1": [1.0]}, TypeError, "w1: expected a torch.Tensor, got list"),
    ({"w2": None}, TypeError, "w2: expected a torch.Tensor, got NoneType"),
    ({"bias": 0.0}, TypeError, "bias: expected a torch.Tensor, got float"),
    ({"x": x.to_sparse()}, TypeError, "x: expected a dense tensor, got layout torch.sparse_coo"),
    ({"x": x.long()}, ValueError, "x: expected dtype float32 or .* or complex128, got int64"),
    ({"w1": w1.half()}, ValueError, "w1: expected dtype float32, got float16"),
    ({"w2": w2.cfloat()}, ValueError, "w2: expected dtype float32, got complex64"),
    ({"bias": bias.double()}, ValueError, "bias: expected dtype float32, got float64"),
    ({"x": x.bfloat16()}, ValueError, "w1: expected dtype bfloat16, got float32"),
    ({"w1": w1[0]}, ValueError, r"w1: expected shape \[k, q, p\], got \[4, 5\]"),
    ({"w2": w2[None]}, ValueError, r"w2: expected shape \[l, s, r\], got \[1, 6, 7, 2\]"),
    (
        {"w2": torch.randn(5, 7, 2)},
        ValueError,
        r"w2: expected shape \[l, s, r\] with l\*r = k\*q = 12 \(w1 is \[3, 4, 5\]\), "
        r"got l\*r = 10 \(\[5, 7, 2\]\)",
    ),
    ({"w2": w2[:0]}, ValueError, r"w2: .* with l\*r = k\*q = 12 .*, got l\*r = 0"),
    (
        {"x": x[:, :14]},
        ValueError,
        r"x: expected shape \[..., k\*p\] = \[..., 15\] \(w1 is \[3, 4, 5\]\), got \[4, 14\]",
    ),
    ({"x": x.sum()}, ValueError, r"x: expected shape .* got \[\]"),
    ({"bias": first}, ValueError, r"bias: expected shape \[s\*l\] = \[42\], got \[12\]"),
    ({"bias": bias[None]}, ValueError, r"bias: expected shape .* got \[1, 42\]"),
    ({"w1": w1.to(**meta)}, ValueError, r"w1: expected device cpu \(x's\), got meta"),
    ({"w2": w2.to(**meta)}, ValueError, r"w2: expected device cpu \(w1's\), got meta"),
    ({"bias": bias.to(**meta)}, ValueError, r"bias: expected device cpu \(x's\), got meta"),
    ({"backend": "cudnn"}, ValueError, "backend: expected one of auto, .*, got 'cudnn'"),
    ({"backend": 3}, TypeError, "backend: expected a str, got int"),
]
BLOCKS = [
    ({"x": 1.0}, TypeError, "x: expected a torch.Tensor, got float"),
    ({"w": None}, TypeError, "w: expected a torch.Tensor, got NoneType"),
    ({"w": w1.half()}, ValueError, "w: expected dtype float32, got float16"),
    ({"w": w1[0]}, ValueError, r"w: expected shape \[k, q, p\], got \[4, 5\]"),
    ({"x": x[:, 1:]}, ValueError, r"x: expected shape \[..., k\*p\] = .*w is.*, got \[4, 14\]"),
    ({"bias": bias}, ValueError, r"bias: expected shape \[k\*q\] = \[12\], got \[42\]"),
    ({"w": w1.to(**meta)}, ValueError, r"w: expected device cpu \(x's\), got meta"),
    ({"backend": "cudnn"}, ValueError, "backend: expected one of auto"),
]
DENSE = [
    ({"w1": None}, TypeError, "w1: expected a torch.Tensor, got NoneType"),
    ({"w2": "w2"}, TypeError, "w2: expected a torch.Tensor, got str"),
    ({"w1": w1.int()}, ValueError, "w1: expected dtype .* got int32"),
    ({"w2": w2.double()}, ValueError, "w2: expected dtype float32, got float64"),
    ({"w1": w1[0]}, ValueError, r"w1: expected shape \[k, q, p\]"),
    ({"w1": w1[:2]}, ValueError, r"w2: .* with l\*r = k\*q = 8 .* got l\*r = 12"),
]
BACKENDS = ["auto", "reference", "cpu", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "words"), MONARCH, ids=lambda v: v[:30] if isinstance(v, str) else None
)
def test_bad_monarch(change, error, words, backend: str) -> None:
    with pytest.raises(error, match=words):
        kk.monarch_matmul(**{**good, "backend": backend, **change})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "words"), BLOCKS, ids=lambda v: v[:30] if isinstance(v, str) else None
)
def test_bad_blocks(change, error, words, backend: str) -> None:
    with pytest.raises(error, match=words):
        kk.block_diag_matmul(**{**good_blocks, "backend": backend, **change})


@pytest.mark.parametrize(
    ("change", "error", "words"), DENSE, ids=lambda v: v[:30] if isinstance(v, str) else None
)
def test_bad_factors(change, error, words) -> None:
    with pytest.raises(error, match=words):
        kk.monarch_to_dense(**{"w1": w1, "w2": w2, **change})


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_doubles_are_the_references(dtype: torch.dtype) -> None:
    wide = {name: t.to(dtype) for name, t in good.items()}
    with pytest.raises(kk.BackendUnavailableError, match="served by the reference alone"):
        kk.monarch_matmul(**wide, backend="cpu")
    blocks = {name: t.to(dtype) for name, t in good_blocks.items()}
    with pytest.raises(kk.BackendUnavailableError, match="served by the reference alone"):
        kk.block_diag_matmul(**blocks, backend="cpu")
    assert kk.monarch_matmul(**wide).dtype == dtype
    assert kk.block_diag_matmul(**blocks).dtype == dtype


def test_a_backend_that_cannot_serve_says_why() -> None:
    with pytest.raises(kk.BackendUnavailableError, match="monarch_matmul: backend 'cuda'"):
        kk.monarch_matmul(**good, backend="cuda")


def test_bad_input_is_named_when_compiling() -> None:
    compiled = torch.compile(kk.monarch_matmul, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="w2: expected shape"):
        compiled(x, w1, w2[1:])
