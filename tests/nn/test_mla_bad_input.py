"""What kk.nn.MultiheadLatentAttention and its DecodeStep refuse, and the words they do it with."""

import pytest
import torch

import kexue_kernels as kk
from kexue_kernels.nn.mla import DecodeStep
from tests.nn.test_mla import DC, DR, HIDDEN, YARN, Layer, make

BAD_OPTIONS = [
    ({"num_heads": 0}, ValueError, "num_heads: expected at least 1, got 0"),
    ({"q_lora_rank": 1.5}, TypeError, "q_lora_rank: expected an int, got float"),
    ({"kv_lora_rank": None}, TypeError, "kv_lora_rank: expected an int, got NoneType"),
    ({"qk_rope_head_dim": 5}, ValueError, "qk_rope_head_dim: expected an even number to turn"),
    ({"qk_nope_head_dim": 0}, ValueError, "qk_nope_head_dim: expected at least 1"),
    ({"rope_theta": 1.0}, ValueError, "rope_theta: expected a number above 1, got 1.0"),
    ({"rope_theta": "10000"}, TypeError, "rope_theta: expected a number, got str"),
    ({"rope_interleaved": 1}, TypeError, "rope_interleaved: expected a bool"),
    ({"rope_scaling": "yarn"}, TypeError, "rope_scaling: expected a dict, got str"),
    (
        {"rope_scaling": {"type": "longrope"}},
        ValueError,
        r"rope_scaling\['rope_type'\]: expected one",
    ),
    ({"rope_scaling": {"rope_type": "linear"}}, ValueError, "expected 'factor' for 'linear'"),
    ({"rope_scaling": {"factor": 0.5}}, ValueError, r"rope_scaling\['factor'\]: .* from 1 on"),
    ({"rope_scaling": {"factor": "2"}}, TypeError, r"rope_scaling\['factor'\]: expected a number"),
    ({"rope_scaling": {"beta": 2}}, ValueError, "rope_scaling: expected only .* got 'beta'"),
    ({"rope_scaling": {**YARN, "beta_slow": 0}}, ValueError, "beta_slow'.: .* positive"),
    ({"rope_scaling": {**YARN, "truncate": 0}}, TypeError, "truncate'.: expected a bool"),
    ({"rope_scaling": {"type": "ntk", "factor": 2}, "qk_rope_head_dim": 2}, ValueError, "least 4"),
    ({"rope_scaling": YARN, "rope_theta": None}, ValueError, "None where nothing turns"),
    ({"softmax_scale": float("inf")}, ValueError, "softmax_scale: expected a finite number"),
    ({"softmax_scale": "1"}, TypeError, "softmax_scale: expected a number"),
    ({"norm_eps": None}, TypeError, "norm_eps: expected a number"),
    ({"norm_eps": -1.0}, ValueError, "norm_eps: expected a number from 0 on"),
    ({"rope_scaling": {**YARN, "mscale": float("nan")}}, ValueError, "mscale'.: .* finite"),
    ({"bias": 1}, TypeError, "bias: expected a bool"),
    ({"dtype": torch.int32}, ValueError, "dtype: expected a real"),
    ({"process_group": 3}, TypeError, "process_group: expected a ProcessGroup"),
    ({"backend": "gpu"}, ValueError, "backend: expected one of"),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD_OPTIONS, ids=lambda v: str(v)[:40])
def test_bad_options(options: dict[str, object], error: type[Exception], words: str) -> None:
    sizes = {"hidden_size": 8, "num_heads": 2, "q_lora_rank": 4, "kv_lora_rank": 4}
    heads = {"qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
    with pytest.raises(error, match=words):
        Layer(**{**sizes, **heads, **options})


X = torch.zeros(2, 4, HIDDEN)
WRONG = torch.tensor([0, 4])


def selected(dtype: torch.dtype = torch.float32, dc: int = DC, dr: int = DR):
    cache = kk.nn.PagedLatentCache(4, 4, dc, dr, dtype=dtype)
    return cache.select([cache.allocate(), cache.allocate()])


BAD_CALLS = [
    (lambda m: m(X[0]), ValueError, r"x: expected shape \[B, T, hidden_size\], got \[4, 20\]"),
    (lambda m: m(X.double()), ValueError, "x: expected dtype float32, got float64"),
    (lambda m: m(X, selected().cache), TypeError, "cache: expected .*select.*got PagedLatentCache"),
    (lambda m: m(X[:1], selected()), ValueError, r"x: expected a row for each of .* 2 sequences"),
    (lambda m: m(X, selected(dc=8)), ValueError, "cache: expected kv_lora_rank = 12, got 8"),
    (lambda m: m(X, selected(dr=8)), ValueError, "cache: expected qk_rope_head_dim = 4, got 8"),
    (lambda m: m(X, selected(torch.float64)), ValueError, "cache: expected one for torch.float32"),
    (lambda m: m(X, DecodeStep(selected())), ValueError, "x: expected the 1 tokens of the Dec"),
    (lambda m: m(X, position_ids=[0, 1]), TypeError, "position_ids: expected a torch.Tensor"),
    (lambda m: m(X, position_ids=WRONG), ValueError, r"position_ids: .*\[T\] = \[4\] or \[B, T\]"),
    (lambda m: m(X, position_ids=X[0, :, 0]), ValueError, "position_ids: expected dtype int32"),
    (lambda m: m(X, cu_seqlens=WRONG), ValueError, "cu_seqlens: expected a batch of 1"),
    (lambda m: m(X, selected(), cu_seqlens=WRONG), ValueError, "cu_seqlens: expected None with"),
    (lambda m: DecodeStep(selected().cache), TypeError, "sequences: expected .*select"),
    (lambda m: DecodeStep(selected(), tokens=0), ValueError, "tokens: expected at least 1"),
    (lambda m: m.shard({}, 2, 2), ValueError, "rank: expected less than world = 2, got 2"),
    (lambda m: m.shard(m.state_dict(), 0, 4), ValueError, "kv_b_proj.weight: expected a mul"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), BAD_CALLS)
def test_bad_calls(call, error: type[Exception], words: str) -> None:
    with torch.no_grad(), pytest.raises(error, match=words):
        call(make())


def test_a_cache_is_for_inference() -> None:
    layer, batch = make(), selected()
    with pytest.raises(RuntimeError, match="with a cache is for inference, but an input requires"):
        layer(X, batch)
    assert batch.cache_seqlens().tolist() == [0, 0]
    assert layer.requires_grad_(False)(X, batch).shape == X.shape


def test_a_backend_that_can_not_serve_takes_no_room() -> None:
    layer, batch = make(backend="cuda"), selected()
    with torch.no_grad(), pytest.raises(kk.BackendUnavailableError, match="mla_cache_append"):
        layer(X, batch)
    assert batch.cache_seqlens().tolist() == [0, 0]
    assert batch.cache.free_blocks == 4


@pytest.mark.parametrize("config", [None, {}, torch.nn.Linear(2, 2)], ids=type)
def test_other_configurations(config: object) -> None:
    with pytest.raises(TypeError, match="config: expected a DeepseekV2Config or DeepseekV3Config"):
        Layer.from_config(config)


def test_a_checkpoint_of_other_sizes() -> None:
    with pytest.raises(RuntimeError, match=r"size mismatch for kv_b_proj.weight.*\[42, 12\]"):
        make().load_state_dict(make(v_head_dim=4).state_dict())
