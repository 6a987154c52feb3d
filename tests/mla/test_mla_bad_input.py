"""What the mla functions refuse, and with which words; nothing is written."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kexue_kernels as kk

Change = dict[str, object]


def decoding(**changes: object) -> dict[str, object]:
    given: dict[str, object] = {
        "q": torch.ones(2, 1, 3, 6),
        "kv_cache": torch.ones(5, 4, 6),
        "block_table": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
        "cache_seqlens": torch.tensor([8, 3], dtype=torch.int32),
        "head_dim_v": 4,
        "softmax_scale": 0.5,
    }
    return given | changes


def appending(**changes: object) -> dict[str, object]:
    given: dict[str, object] = {
        "kv_latent": torch.ones(3, 4),
        "k_rope": torch.ones(3, 2),
        "kv_cache": torch.zeros(5, 4, 6),
        "slot_mapping": torch.arange(3),
    }
    return given | changes


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def bytes_of(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


QUERY = torch.ones(2, 1, 3, 132).bfloat16()

DECODE: list[tuple[Change, type[Exception], str]] = [
    ({"q": [1]}, TypeError, "q: expected a torch.Tensor, got list"),
    ({"q": torch.ones(2, 3, 6)}, ValueError, r"q: expected shape \[B, Tq, H, dc \+ dr\]"),
    ({"q": torch.ones(2, 1, 3, 6).long()}, ValueError, "q: expected dtype"),
    ({"q": torch.ones(2, 1, 3, 6).half()}, ValueError, "kv_cache: expected dtype float16"),
    ({"q": torch.ones(2, 1, 3, 6, device="meta")}, ValueError, "kv_cache: expected device meta"),
    ({"kv_cache": torch.ones(5, 4, 7)}, ValueError, "kv_cache: expected shape"),
    ({"kv_cache": torch.ones(5, 4, 2, 6)}, ValueError, "kv_cache: expected shape"),
    ({"kv_cache": torch.ones(5, 0, 6)}, ValueError, "kv_cache: expected block_size of at least 1"),
    (
        {"kv_cache": bytes_of(5, 4, 6)},
        ValueError,
        "q: expected dtype bfloat16 beside a kv_cache of bytes, got float32",
    ),
    (
        {"q": QUERY, "kv_cache": bytes_of(5, 4, 140), "head_dim_v": 120},
        ValueError,
        "kv_cache: expected dc a multiple of 128.*got dc = 120 and dr = 12",
    ),
    (
        {"q": QUERY[..., :131], "kv_cache": bytes_of(5, 4, 138), "head_dim_v": 128},
        ValueError,
        "kv_cache: expected dc .* dr an even number.*got dc = 128 and dr = 3",
    ),
    (
        {"q": QUERY, "kv_cache": bytes_of(5, 4, 141), "head_dim_v": 128},
        ValueError,
        r"kv_cache: expected shape \[num_blocks, block_size, dc \+ dc/32 \+ 2 dr\] = \[5, 4, 140\]",
    ),
    (
        {"q": QUERY, "kv_cache": bytes_of(5, 4, 1, 656), "head_dim_v": 128},
        ValueError,
        r"kv_cache: expected shape .* = \[5, 4, 1, 140\]",
    ),
    ({"block_table": torch.ones(2, 2)}, ValueError, "block_table: expected dtype int32"),
    ({"block_table": ints(0, 1)}, ValueError, r"block_table: expected shape \[B, max_blocks\]"),
    ({"block_table": ints(0, 1)[None]}, ValueError, "block_table: expected shape"),
    (
        {"block_table": ints(0, 5, 1, 1).view(2, 2)},
        ValueError,
        "block_table: expected ids from 0 to 4.*got 5",
    ),
    (
        {"block_table": ints(0, -1, 1, 1).view(2, 2)},
        ValueError,
        "block_table: expected ids.*got -1",
    ),
    ({"cache_seqlens": ints(8)}, ValueError, r"cache_seqlens: expected shape \[B\]"),
    (
        {"cache_seqlens": ints(9, 1)},
        ValueError,
        "cache_seqlens: expected lengths from 0 to 8.*got 9",
    ),
    ({"cache_seqlens": ints(-1, 1)}, ValueError, "cache_seqlens: expected lengths.*got -1"),
    ({"head_dim_v": 7}, ValueError, r"head_dim_v: expected at most dc \+ dr = 6, got 7"),
    ({"head_dim_v": 0}, ValueError, "head_dim_v: expected at least 1, got 0"),
    ({"head_dim_v": 2.0}, TypeError, "head_dim_v: expected an int, got float"),
    ({"softmax_scale": "1"}, TypeError, "softmax_scale: expected a number, got str"),
    ({"softmax_scale": float("nan")}, ValueError, "softmax_scale: expected a finite number, got n"),
    ({"causal": 1}, TypeError, "causal: expected a bool, got int"),
    ({"return_lse": None}, TypeError, "return_lse: expected a bool"),
    ({"num_splits": 0}, ValueError, "num_splits: expected at least 1, got 0"),
    ({"backend": "rocm"}, ValueError, "backend: expected one of"),
]

APPEND: list[tuple[Change, type[Exception], str]] = [
    ({"kv_latent": torch.ones(4)}, ValueError, r"kv_latent: expected shape \[T, dc\]"),
    ({"k_rope": torch.ones(2, 2)}, ValueError, r"k_rope: expected shape \[T, dr\] = \[3, 2\]"),
    ({"k_rope": torch.ones(3, 2).half()}, ValueError, "k_rope: expected dtype float32"),
    ({"kv_cache": torch.ones(5, 4, 7)}, ValueError, "kv_cache: expected shape"),
    ({"kv_cache": torch.ones(5, 4, 6).half()}, ValueError, "kv_cache: expected dtype float32"),
    (
        {"kv_cache": bytes_of(5, 4, 6)},
        ValueError,
        "kv_latent: expected dtype bfloat16 beside a kv_cache of bytes, got float32",
    ),
    (
        {
            "kv_latent": torch.ones(3, 4).bfloat16(),
            "k_rope": torch.ones(3, 2).bfloat16(),
            "kv_cache": bytes_of(5, 4, 8),
        },
        ValueError,
        "kv_cache: expected dc a multiple of 128.*got dc = 4",
    ),
    ({"slot_mapping": torch.ones(3)}, ValueError, "slot_mapping: expected dtype"),
    ({"slot_mapping": torch.arange(2)}, ValueError, r"slot_mapping: expected shape \[T\]"),
    (
        {"slot_mapping": torch.tensor([0, 20, 1])},
        ValueError,
        "slot_mapping: expected slots.*got 20",
    ),
    ({"norm_weight": torch.ones(5)}, ValueError, r"norm_weight: expected shape \[dc\] = \[4\]"),
    ({"norm_eps": "x"}, TypeError, "norm_eps: expected a number"),
    ({"norm_eps": float("nan")}, ValueError, "norm_eps: expected a finite number, got nan"),
    ({"norm_eps": -1}, ValueError, "norm_eps: expected a number from 0 on, got -1"),
    ({"cos": torch.ones(3, 1)}, ValueError, "sin: expected a tensor beside cos, got None"),
    ({"sin": torch.ones(3, 1)}, ValueError, "cos: expected a tensor beside sin, got None"),
    (
        {"cos": torch.ones(3, 1), "sin": torch.ones(3, 3)},
        ValueError,
        r"sin: expected shape \[T, dr/2\]",
    ),
    (
        {"cos": torch.ones(3, 1), "sin": torch.ones(3, 2)},
        ValueError,
        r"sin: expected shape \[T, width of cos\] = \[3, 1\], got \[3, 2\]",
    ),
    (
        {"kv_cache": torch.zeros(1, 4, 6).expand(5, -1, -1)},
        ValueError,
        "kv_cache: expected memory of its own for each element",
    ),
    ({"rope_interleaved": 1}, TypeError, "rope_interleaved: expected a bool"),
]


@pytest.mark.parametrize(
    ("changes", "error", "words"), DECODE, ids=lambda v: v[:40] if isinstance(v, str) else None
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_decode(changes: Change, error: type[Exception], words: str, backend: str) -> None:
    with pytest.raises(error, match=words):
        kk.mla_decode(**{"backend": backend, **decoding(**changes)})


@pytest.mark.parametrize(
    ("changes", "error", "words"), APPEND, ids=lambda v: v[:40] if isinstance(v, str) else None
)
def test_append(changes: Change, error: type[Exception], words: str) -> None:
    given = appending(**changes)
    before = given["kv_cache"].clone()
    with pytest.raises(error, match=words):
        kk.mla_cache_append(**given)
    assert torch.equal(given["kv_cache"], before)


@pytest.mark.parametrize("width", [1, 3])
def test_an_odd_key_can_not_be_turned(width: int) -> None:
    given = appending(k_rope=torch.ones(3, 3), kv_cache=torch.zeros(5, 4, 7))
    with pytest.raises(ValueError, match="k_rope: expected an even dr"):
        kk.mla_cache_append(**given, cos=torch.ones(3, width), sin=torch.ones(3, width))


@pytest.mark.parametrize(
    "cache",
    [bytes_of(5, 4, 142)[..., :140], bytes_of(5, 4, 141)[..., 1:], bytes_of(5, 4, 280)[..., ::2]],
)
def test_scales_are_read_as_they_lie(cache: Tensor) -> None:
    given = decoding(q=QUERY, kv_cache=cache, head_dim_v=128)
    words = "kv_cache: expected the bytes of a row side by side and rows at multiples of 4 bytes"
    with pytest.raises(ValueError, match=words):
        kk.mla_decode(**given)
    latent, key = QUERY[:, 0, 0, :128], QUERY[:, 0, 0, 128:]
    with pytest.raises(ValueError, match=words):
        kk.mla_cache_append(latent, key, cache, torch.arange(2))
    assert not cache.any()


@pytest.mark.parametrize("wrong", [False, 1])
def test_flash_mla_s_word_on_bytes_must_agree(wrong: object) -> None:
    given = decoding(q=QUERY, k_cache=bytes_of(5, 4, 140), head_dim_v=128)
    del given["kv_cache"]
    error, words = (TypeError, "a bool, got int") if wrong == 1 else (ValueError, "True.*uint8")
    with pytest.raises(error, match=f"is_fp8_kvcache: expected {words}"):
        kk.flash_mla_with_kvcache(**given, is_fp8_kvcache=wrong)


def with_grad(make: Callable[..., dict[str, object]], name: str) -> dict[str, object]:
    given = make()
    given[name] = given[name].requires_grad_()
    return given


@pytest.mark.parametrize(
    ("cache", "error", "words"),
    [
        ([1.0], TypeError, "k_cache: expected a torch.Tensor, got list"),
        (torch.ones(5, 4, 1, 6).half(), ValueError, "k_cache: expected dtype float32, got float16"),
        (torch.ones(5, 4, 1, 7), ValueError, r"k_cache: expected shape .* got \[5, 4, 1, 7\]"),
    ],
)
def test_flash_mla_s_cache_has_its_name(cache: object, error: type[Exception], words: str) -> None:
    tables = torch.zeros(1, 2, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    with pytest.raises(error, match=words):
        kk.flash_mla_with_kvcache(torch.ones(1, 1, 2, 6), cache, *tables, 4)


@pytest.mark.parametrize("name", ["q", "kv_cache"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_decoding_is_for_inference(name: str, backend: str) -> None:
    given = with_grad(decoding, name)
    with pytest.raises(RuntimeError, match="mla_decode is for inference"):
        kk.mla_decode(**given, backend=backend)
    with torch.no_grad():
        kk.mla_decode(**given, backend=backend)


@pytest.mark.parametrize("name", ["kv_latent", "k_rope", "kv_cache"])
def test_appending_is_for_inference(name: str) -> None:
    with pytest.raises(RuntimeError, match="mla_cache_append is for inference"):
        kk.mla_cache_append(**with_grad(appending, name))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"out_b": torch.ones(2, 3, 1, 5)}, "out_b: expected shape"),
        ({"out_b": torch.ones(2, 3, 1, 4).half()}, "out_b: expected dtype float32"),
        ({"lse_a": torch.ones(2, 3, 1)}, r"lse_a: expected shape \[B, H, T\] = \[2, 1, 3\]"),
        ({"lse_b": torch.ones(2, 1, 3).half()}, "lse_b: expected dtype float32"),
    ],
)
def test_merging(changes: dict[str, Tensor], words: str) -> None:
    out, lse = torch.ones(2, 3, 1, 4), torch.ones(2, 1, 3)
    given = {"out_a": out, "lse_a": lse, "out_b": out, "lse_b": lse} | changes
    with pytest.raises(ValueError, match=words):
        kk.merge_attention_states(**given)


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_doubles_are_the_references(backend: str) -> None:
    given = decoding(q=torch.ones(2, 1, 3, 6).double(), kv_cache=torch.ones(5, 4, 6).double())
    assert kk.mla_decode(**given).dtype == torch.float64
    with pytest.raises(kk.BackendUnavailableError, match="mla_decode: backend"):
        kk.mla_decode(**given, backend=backend)
