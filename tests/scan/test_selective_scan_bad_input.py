"""Each bad call raises before anything runs, naming the argument, what was expected, what came."""

import pytest
import torch

import kexue_kernels as kk

u = torch.randn(2, 5, 4)
A = -torch.rand(4, 3)
B = torch.randn(2, 5, 3)
ONE = {"u": u[:1], "delta": u[:1], "B": B[:1], "C": B[:1]}


def cu(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD = [
    ({"u": None}, TypeError, "u: expected a torch.Tensor, got NoneType"),
    ({"A": [1.0]}, TypeError, "A: expected a torch.Tensor, got list"),
    ({"z": 1.0}, TypeError, "z: expected a torch.Tensor, got float"),
    ({"D": 1.0}, TypeError, "D: expected a torch.Tensor, got float"),
    ({"u": u[0]}, ValueError, r"u: expected shape \[batch, L, d\], got \[5, 4\]"),
    ({"u": u.long()}, ValueError, "u: expected dtype float32 or .* got int64"),
    ({"u": u.cfloat()}, ValueError, "u: .* got complex64"),
    ({"delta": u[:, :3]}, ValueError, r"delta: .* = \[2, 5, 4\], got \[2, 3, 4\]"),
    ({"delta": u.half()}, ValueError, "delta: expected dtype float32, got float16"),
    ({"delta": u.to("meta")}, ValueError, "delta: expected device cpu"),
    ({"z": u[..., :2]}, ValueError, r"z: .* got \[2, 5, 2\]"),
    ({"A": A.half()}, ValueError, "A: expected dtype float32 or complex64, got float16"),
    ({"A": A.double()}, ValueError, "A: .* got float64"),
    ({"A": A[0]}, ValueError, r"A: expected shape \[d, n\], got \[3\]"),
    ({"A": A[:2]}, ValueError, r"A: expected shape \[d, n\] = \[4, 3\], got \[2, 3\]"),
    ({"A": A.to("meta")}, ValueError, "A: expected device"),
    ({"B": B[:, :2]}, ValueError, r"B: .* \[batch, L, n\] = \[2, 5, 3\], got \[2, 2, 3\]"),
    ({"C": B[..., :2]}, ValueError, r"C: .* got \[2, 5, 2\]"),
    ({"C": torch.randn(2, 5, 3, 3)}, ValueError, "C: .* groups that divides d = 4, got 3"),
    ({"C": torch.randn(2, 5, 0, 3)}, ValueError, "C: .* groups that divides d = 4, got 0"),
    ({"B": torch.randn(3, 4)}, ValueError, r"B: expected shape \[d, n\] = \[4, 3\], got \[3, 4\]"),
    ({"B": torch.randn(3)}, ValueError, r"B: expected shape \[batch, L, n\], .* got \[3\]"),
    ({"B": B.half()}, ValueError, "B: expected dtype float32, got float16"),
    ({"A": A.cfloat()}, ValueError, "B: expected dtype complex64, got float32"),
    ({"B": B.cfloat()}, ValueError, "B: expected dtype float32, got complex64"),
    ({"D": torch.randn(3)}, ValueError, r"D: expected shape \[d\] = \[4\], got \[3\]"),
    ({"D": torch.randn(4).half()}, ValueError, "D: .* got float16"),
    ({"delta_bias": torch.randn(4, 1)}, ValueError, r"delta_bias: .* got \[4, 1\]"),
    ({"delta_bias": torch.randn(4, device="meta")}, ValueError, "delta_bias: expected device"),
    ({"delta_softplus": 1}, TypeError, "delta_softplus: expected a bool, got int"),
    ({"return_final_state": None}, TypeError, "return_final_state: expected a bool"),
    ({"initial_state": 0}, TypeError, "initial_state: expected a torch.Tensor, got int"),
    ({"initial_state": A[None]}, ValueError, r"initial_state: .* = \[2, 4, 3\], got \[1, 4, 3\]"),
    ({"initial_state": A.expand(2, 4, 3).cfloat()}, ValueError, "initial_state: .* complex64"),
    ({"cu_seqlens": cu(0, 5)}, ValueError, "cu_seqlens: expected a batch of 1 .* of 2"),
    ({**ONE, "cu_seqlens": [0, 5]}, TypeError, "cu_seqlens: expected a torch.Tensor"),
    ({**ONE, "cu_seqlens": cu(1, 5)}, ValueError, "cu_seqlens: .* first value .* got 1"),
    ({**ONE, "cu_seqlens": cu(0, 3, 2, 5)}, ValueError, "cu_seqlens: .* got 3 then 2"),
    ({**ONE, "cu_seqlens": cu(0, 9)}, ValueError, "cu_seqlens: .* L = 5, got 9"),
    (
        {**ONE, "cu_seqlens": cu(0, 2, 5), "initial_state": A[None]},
        ValueError,
        r"initial_state: .* \[N, d, n\] = \[2, 4, 3\]",
    ),
    ({"backend": "cudnn"}, ValueError, "backend: expected one of auto, .* got 'cudnn'"),
]


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu", "triton"])
@pytest.mark.parametrize(
    ("change", "error", "words"), BAD, ids=lambda v: v[:40] if isinstance(v, str) else None
)
def test_bad_input(change, error, words, backend: str) -> None:
    good = {"u": u, "delta": u, "A": A, "B": B, "C": B, "backend": backend}
    with pytest.raises(error, match=words):
        kk.selective_scan(**{**good, **change})


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_doubles_are_the_references(backend: str) -> None:
    wide = [x.double() for x in (u, u, A, B, B)]
    with pytest.raises(kk.BackendUnavailableError, match="served by the reference alone"):
        kk.selective_scan(*wide, backend=backend)
    assert kk.selective_scan(*wide).dtype == torch.float64


@pytest.mark.parametrize("sizes", [(2, 0), (0, 5)])
def test_an_unavailable_backend_is_refused_for_empty_inputs_too(sizes: tuple[int, int]) -> None:
    batch, L = sizes
    empty, matrix = torch.randn(batch, L, 4), torch.randn(batch, L, 3)
    with pytest.raises(kk.BackendUnavailableError, match="selective_scan"):
        kk.selective_scan(empty, empty, A, matrix, matrix, backend="cuda")
