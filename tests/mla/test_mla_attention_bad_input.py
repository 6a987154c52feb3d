"""What mla_attention refuses, and with which words."""

import pytest
import torch
from torch import Tensor

import kexue_kernels as kk
from tests.mla.attention_cases import NAMES, Case, make

Change = dict[str, object]
CASE = Case(1, 6, 2, 4, 2, 3, 5)


def given(**changes: object) -> dict[str, object]:
    inputs = make(CASE)
    return {name: inputs[name] for name in NAMES} | changes


def ends(*values: int) -> Tensor:
    return torch.tensor(values)


BAD: list[tuple[Change, type[Exception], str]] = [
    ({"q_nope": [1]}, TypeError, "q_nope: expected a torch.Tensor, got list"),
    ({"w_uv": None}, TypeError, "w_uv: expected a torch.Tensor, got NoneType"),
    ({"k_rope": torch.ones(2, 2).to_sparse()}, TypeError, "k_rope: expected a dense tensor"),
    ({"q_nope": torch.ones(1, 6, 8)}, ValueError, r"q_nope: expected shape \[B, T, H, dk\]"),
    ({"q_nope": torch.ones(1, 6, 2, 4).long()}, ValueError, "q_nope: expected dtype float32 or"),
    ({"q_nope": torch.ones(1, 6, 2, 4).cfloat()}, ValueError, "q_nope: expected dtype float32 or"),
    ({"q_nope": torch.ones(1, 6, 2, 4).half()}, ValueError, "q_rope: expected dtype float16"),
    ({"w_uk": torch.ones(2, 4, 5).bfloat16()}, ValueError, "w_uk: expected dtype float32, got b"),
    ({"q_nope": torch.ones(1, 6, 2, 4, device="meta")}, ValueError, "q_rope: expected device meta"),
    ({"w_uv": torch.ones(2, 3, 5, device="meta")}, ValueError, "w_uv: expected device cpu"),
    ({"q_rope": torch.ones(1, 6, 2)}, ValueError, r"q_rope: expected shape \[B, T, H, dr\]"),
    ({"q_rope": torch.ones(1, 6, 3, 2)}, ValueError, r"q_rope: .* = \[1, 6, 2, 2\], got"),
    ({"kv_latent": torch.ones(6, 5)}, ValueError, r"kv_latent: expected shape \[B, T, dc\]"),
    ({"kv_latent": torch.ones(1, 7, 5)}, ValueError, r"kv_latent: .* = \[1, 6, 5\], got \[1, 7"),
    ({"k_rope": torch.ones(1, 6, 3)}, ValueError, r"k_rope: expected shape \[B, T, dr\] = \[1, 6"),
    ({"k_rope": torch.ones(1, 6, 1, 2)}, ValueError, r"k_rope: expected shape \[B, T, dr\]"),
    ({"w_uk": torch.ones(2, 4, 6)}, ValueError, r"w_uk: expected shape \[H, dk, dc\] = \[2, 4, 5"),
    ({"w_uk": torch.ones(8, 5)}, ValueError, r"w_uk: expected shape \[H, dk, dc\]"),
    ({"w_uv": torch.ones(6, 5)}, ValueError, r"w_uv: expected shape \[H, dv, dc\], got \[6, 5\]"),
    ({"w_uv": torch.ones(1, 3, 5)}, ValueError, r"w_uv: expected shape \[H, dv, dc\] = \[2, 3, 5"),
    ({"softmax_scale": "1"}, TypeError, "softmax_scale: expected a number, got str"),
    ({"softmax_scale": True}, TypeError, "softmax_scale: expected a number, got bool"),
    ({"softmax_scale": torch.ones(())}, TypeError, "softmax_scale: expected a number, got Tensor"),
    ({"softmax_scale": float("nan")}, ValueError, "softmax_scale: expected a finite number, got n"),
    ({"softmax_scale": float("-inf")}, ValueError, "softmax_scale: expected a finite .*got -inf"),
    ({"causal": 1}, TypeError, "causal: expected a bool, got int"),
    ({"backend": "rocm"}, ValueError, "backend: expected one of"),
    ({"backend": 1}, TypeError, "backend: expected a str"),
    ({"cu_seqlens": [0, 6]}, TypeError, "cu_seqlens: expected a torch.Tensor, got list"),
    ({"cu_seqlens": torch.tensor([0.0, 6.0])}, ValueError, "cu_seqlens: expected dtype int32 or"),
    ({"cu_seqlens": ends(0, 6)[None]}, ValueError, r"cu_seqlens: expected shape \[N \+ 1\]"),
    ({"cu_seqlens": ends()}, ValueError, "cu_seqlens: expected"),
    ({"cu_seqlens": ends(0, 6).to("meta")}, ValueError, "cu_seqlens: expected device cpu"),
    ({"cu_seqlens": ends(1, 6)}, ValueError, "cu_seqlens: expected the first value to be 0, got 1"),
    ({"cu_seqlens": ends(0, 5)}, ValueError, "cu_seqlens: expected the last value to be .*6, got"),
    ({"cu_seqlens": ends(0, 4, 2, 6)}, ValueError, "cu_seqlens: .*never descend, got 4 then 2"),
]


@pytest.mark.parametrize(
    ("changes", "error", "words"), BAD, ids=lambda v: v[:40] if isinstance(v, str) else None
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_refused(changes: Change, error: type[Exception], words: str, backend: str) -> None:
    with pytest.raises(error, match=words):
        kk.mla_attention(**{"backend": backend, **given(**changes)})


def test_packing_wants_a_batch_of_one() -> None:
    inputs = make(Case(2, 6, 2, 4, 2, 3, 5))
    data = (inputs[name] for name in NAMES)
    with pytest.raises(ValueError, match="cu_seqlens: expected a batch of 1 in q_nope"):
        kk.mla_attention(*data, cu_seqlens=ends(0, 6))


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_doubles_are_the_references(backend: str) -> None:
    doubles = {name: x.double() for name, x in given().items() if isinstance(x, Tensor)}
    assert kk.mla_attention(**doubles).dtype == torch.float64
    with pytest.raises(kk.BackendUnavailableError, match="mla_attention: backend"):
        kk.mla_attention(**doubles, backend=backend)


def test_a_forced_backend_that_is_missing_raises_for_nothing_too() -> None:
    empty = make(Case(1, 0, 2, 4, 2, 3, 5))
    with pytest.raises(kk.BackendUnavailableError, match="cuda"):
        kk.mla_attention(*(empty[name] for name in NAMES), backend="cuda")
