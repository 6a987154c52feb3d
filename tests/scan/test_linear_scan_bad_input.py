"""Each bad call raises before anything runs, naming the argument, what was expected, what came."""

import pytest
import torch

import kexue_kernels as kk

x = torch.randn(2, 4, 3)
one = torch.randn(1, 4, 3)


def cu(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD = [
    ((None, x), {}, TypeError, "a: expected a torch.Tensor, got NoneType"),
    ((x, [1.0]), {}, TypeError, "b: expected a torch.Tensor, got list"),
    ((x.to_sparse(), x), {}, TypeError, "a: expected a dense tensor"),
    ((torch.nested.nested_tensor([x[0]]), x), {}, TypeError, "a: .* dense tensor, got a nested"),
    ((x[0], x[0]), {}, ValueError, r"b: expected shape \[B, L, D\], got \[4, 3\]"),
    ((x[None], x[None]), {}, ValueError, r"b: expected shape \[B, L, D\], got \[1, 2, 4, 3\]"),
    ((x[:, :3], x), {}, ValueError, r"a: .* broadcasts to b's \[2, 4, 3\], got \[2, 3, 3\]"),
    ((x[..., :2], x), {}, ValueError, r"a: .* got \[2, 4, 2\]"),
    ((x[None], x), {}, ValueError, r"a: .* got \[1, 2, 4, 3\]"),
    ((x, x[:, :1]), {}, ValueError, r"a: .* broadcasts to b's \[2, 1, 3\]"),
    ((x.long(), x.long()), {}, ValueError, "b: expected dtype float32 or .* got int64"),
    ((x.bool(), x.bool()), {}, ValueError, "b: .* got bool"),
    ((x.double(), x), {}, ValueError, "a: expected dtype float32, got float64"),
    ((x, x.cfloat()), {}, ValueError, "a: expected dtype complex64, got float32"),
    ((x.to("meta"), x), {}, ValueError, r"a: expected device cpu \(b's\), got meta"),
    ((x, x, torch.randn(3)), {}, ValueError, r"initial_state: .* \[B, D\] = \[2, 3\], got \[3\]"),
    ((x, x, torch.randn(1, 3)), {}, ValueError, r"initial_state: .* = \[2, 3\], got \[1, 3\]"),
    ((x, x, torch.randn(2, 3).double()), {}, ValueError, "initial_state: .* got float64"),
    ((x, x, torch.randn(2, 3).half()), {}, ValueError, "initial_state: .* got float16"),
    ((x, x, 0.0), {}, TypeError, "initial_state: expected a torch.Tensor, got float"),
    ((x, x, torch.empty(2, 3, device="meta")), {}, ValueError, "initial_state: expected device"),
    ((x, x), {"reverse": 1}, TypeError, "reverse: expected a bool, got int"),
    ((x, x), {"return_final_state": None}, TypeError, "return_final_state: expected a bool"),
    ((x, x), {"cu_seqlens": cu(0, 4)}, ValueError, "cu_seqlens: expected a batch of 1 .* of 2"),
    ((one, one), {"cu_seqlens": [0, 4]}, TypeError, "cu_seqlens: expected a torch.Tensor"),
    ((one, one), {"cu_seqlens": cu(0, 4).float()}, ValueError, "cu_seqlens: .* int32 or int64"),
    ((one, one), {"cu_seqlens": cu(0, 4)[None]}, ValueError, r"cu_seqlens: .* \[N \+ 1\]"),
    ((one, one), {"cu_seqlens": cu()}, ValueError, r"cu_seqlens: .* \[N \+ 1\], got \[0\]"),
    ((one, one), {"cu_seqlens": cu(1, 4)}, ValueError, "cu_seqlens: .* first value .* got 1"),
    ((one, one), {"cu_seqlens": cu(0, 3, 2, 4)}, ValueError, "cu_seqlens: .* got 3 then 2"),
    ((one, one), {"cu_seqlens": cu(0, 3)}, ValueError, "cu_seqlens: .* L = 4, got 3"),
    ((one, one), {"cu_seqlens": cu(0, 9)}, ValueError, "cu_seqlens: .* L = 4, got 9"),
    ((one, one, torch.randn(2, 3)), {"cu_seqlens": cu(0, 4)}, ValueError, r"\[N, D\] = \[1, 3\]"),
    ((x, x), {"backend": "cudnn"}, ValueError, "backend: expected one of auto, .* got 'cudnn'"),
    ((x, x), {"backend": 3}, TypeError, "backend: expected a str, got int"),
]


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu", "triton"])
@pytest.mark.parametrize(
    ("args", "options", "error", "words"), BAD, ids=lambda v: v[:40] if isinstance(v, str) else None
)
def test_bad_input(args, options, error, words, backend: str) -> None:
    with pytest.raises(error, match=words):
        kk.linear_scan(*args, **{"backend": backend, **options})


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_doubles_are_the_references(dtype: torch.dtype, backend: str) -> None:
    with pytest.raises(kk.BackendUnavailableError, match="served by the reference alone"):
        kk.linear_scan(x.to(dtype), x.to(dtype), backend=backend)
    assert kk.linear_scan(x.to(dtype), x.to(dtype)).dtype == dtype
