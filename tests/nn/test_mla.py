"""kk.nn.MultiheadLatentAttention against its definition and Transformers' modules."""

import copy

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import kexue_kernels as kk
from kexue_kernels.nn.mla import DecodeStep, RotaryAngles
from kexue_kernels.nn.mla.attention import TILE, expanding_is_cheaper
from tests.nn.parts import check_as_near, gradients

Layer = kk.nn.MultiheadLatentAttention
HIDDEN, HEADS, DC, DK, DR, DV = 20, 3, 12, 8, 4, 6
TIGHT = {"rtol": 1e-10, "atol": 1e-11}
YARN = {  # as DeepSeek-V3 ships it, for a shorter context
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 16,
    "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
OPTIONS = [
    {},
    {"q_lora_rank": None, "rope_interleaved": False, "bias": True},
    {"rope_scaling": YARN, "norm_eps": 1e-3},
    {"rope_theta": None, "softmax_scale": 0.2},
    {"qk_rope_head_dim": 0},
]


def make(dtype: torch.dtype = torch.float32, seed: int = 0, **options) -> Layer:
    torch.manual_seed(seed)
    sizes = {
        "q_lora_rank": 10, "kv_lora_rank": DC, "qk_nope_head_dim": DK, "qk_rope_head_dim": DR,
        "v_head_dim": DV,
    }  # fmt: skip
    layer = Layer(HIDDEN, HEADS, dtype=dtype, **{**sizes, **options})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2) if parameter.ndim > 1 else parameter.add_(torch.rand_like(parameter))
    return layer


def empty_cache(layer: Layer, sequences: int, num_blocks: int = 60, block_size: int = 4):
    weight = layer.o_proj.weight
    cache = kk.nn.PagedLatentCache(
        num_blocks, block_size, layer.kv_lora_rank, layer.qk_rope_head_dim,
        dtype=weight.dtype, device=weight.device,
    )  # fmt: skip
    return cache, [cache.allocate() for _ in range(sequences)]


def check_near(x: Tensor, true: Tensor) -> None:
    """Some roundings of the largest number apart: the same sums in another order."""
    assert x.shape == true.shape
    assert x.dtype == true.dtype
    assert (x - true).abs().max() <= 32 * torch.finfo(x.dtype).eps * true.abs().max()


def naive(m: Layer, x: Tensor, positions: Tensor | None = None) -> Tensor:
    """The definition, with keys and values of all heads."""
    B, T, _ = x.shape
    dk, dr = m.qk_nope_head_dim, m.qk_rope_head_dim

    def norm(part, y):
        return part.weight * y * (y.square().mean(-1, keepdim=True) + m.norm_eps).rsqrt()

    def turn(y):  # [B, T, H, dr]
        if m.rope is None:
            return y
        given = torch.arange(T).expand(B, T) if positions is None else positions
        cos, sin = (part.to(y.dtype)[:, :, None] for part in m.rope(given))
        z = y.clone()
        for i in range(dr // 2):
            a, b = (2 * i, 2 * i + 1) if m.rope_interleaved else (i, i + dr // 2)
            z[..., a] = y[..., a] * cos[..., i] - y[..., b] * sin[..., i]
            z[..., b] = y[..., b] * cos[..., i] + y[..., a] * sin[..., i]
        return z

    q = x if m.q_lora_rank is None else norm(m.q_a_layernorm, m.q_a_proj(x))
    q = (m.q_proj if m.q_lora_rank is None else m.q_b_proj)(q).view(B, T, HEADS, dk + dr)
    latent, key = m.kv_a_proj_with_mqa(x).split([DC, dr], -1)
    kv = m.kv_b_proj(norm(m.kv_a_layernorm, latent)).view(B, T, HEADS, -1)
    k = torch.cat([kv[..., :dk], turn(key[:, :, None]).expand(B, T, HEADS, dr)], -1)
    q = torch.cat([q[..., :dk], turn(q[..., dk:])], -1)
    scores = m.softmax_scale * torch.einsum("bthd,bnhd->bhtn", q, k)
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return m.o_proj(torch.einsum("bhtn,bnhv->bthv", weights, kv[..., dk:]).flatten(2))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_float64_is_the_definition(options: dict[str, object]) -> None:
    layer = make(torch.float64, **options)
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    y, expected = layer(x), naive(layer, x)
    assert_close(y, expected, **TIGHT)
    assert_close(gradients([y], inputs), gradients([expected], inputs), **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_as_near_as_the_definition(dtype: torch.dtype, backend: str) -> None:
    layer = make(dtype, backend=backend)
    x = torch.randn(2, 70, HIDDEN).to(dtype)

    def run(model, function, dtype):
        wide = x.to(dtype).requires_grad_()
        y = function(model, wide)
        return [y, *gradients([y], [wide, *model.parameters()])]

    exact = run(copy.deepcopy(layer).double(), naive, torch.float64)
    plain = run(layer, naive, dtype)
    check_as_near(run(layer, Layer.forward, dtype), plain, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_prefill_and_steps_are_the_whole(options: dict[str, object], dtype: torch.dtype) -> None:
    layer = make(dtype, **options)
    x = torch.randn(2, 30, HIDDEN, dtype=dtype)
    expected, (cache, ids) = naive(layer, x), empty_cache(layer, 2)
    batch = cache.select(ids)
    with torch.no_grad():
        found = [layer(part, batch) for part in x.split([20, 1, 1, 3, 5], 1)]
    check_near(torch.cat(found, 1), expected)
    assert batch.cache_seqlens().tolist() == [30, 30]


def test_sequences_of_different_lengths() -> None:
    layer, lengths = make(), (5, 0, 11)
    x = torch.randn(3, 14, HIDDEN)
    cache, ids = empty_cache(layer, 3)
    with torch.no_grad():
        for seq_id, row, length in zip(ids, x, lengths, strict=True):
            layer(row[None, :length], cache.select([seq_id]))
        found = []
        for t in range(3):
            following = [row[n + t] for row, n in zip(x, lengths, strict=True)]
            found.append(layer(torch.stack(following)[:, None], cache.select(ids)))
        for b, n in enumerate(lengths):
            expected = layer(x[b : b + 1, : n + 3])[0, n:]
            check_near(torch.cat([y[b] for y in found]), expected)


def test_decodes_by_triton() -> None:
    layer, same = make(backend="triton"), make()
    x = torch.randn(2, 7, HIDDEN)
    cache, ids = empty_cache(layer, 2)
    with torch.no_grad():
        found = [layer(part, cache.select(ids)) for part in x.split([5, 1, 1], 1)]
    check_near(torch.cat(found, 1), same(x))


def test_position_ids() -> None:
    layer = make(torch.float64)
    x = torch.randn(2, 7, HIDDEN, dtype=torch.float64)
    ids = torch.tensor([[3, 4, 5, 9, 10, 11, 30], [0, 0, 0, 1, 2, 3, 4]])
    expected = naive(layer, x, ids)
    assert_close(layer(x, position_ids=ids), expected, **TIGHT)
    assert_close(layer(x, position_ids=ids[0])[0], expected[0], **TIGHT)
    assert_close(layer(x, position_ids=torch.arange(7) + 100), layer(x), rtol=0, atol=1e-5)
    cache, seq_ids = empty_cache(layer, 2)
    with torch.no_grad():
        found = [layer(x[:, part], cache.select(seq_ids), ids.int()[:, part])
                 for part in (slice(0, 4), slice(4, 7))]  # fmt: skip
    assert_close(torch.cat(found, 1), expected, **TIGHT)


def test_packed_sequences() -> None:
    layer = make(torch.float64)
    x = torch.randn(1, 9, HIDDEN, dtype=torch.float64)
    expected = torch.cat([layer(x[:, :4]), layer(x[:, 4:])], 1)
    for dtype in (torch.int32, torch.int64):
        y = layer(x, cu_seqlens=torch.tensor([0, 4, 4, 9], dtype=dtype))
        assert_close(y, expected, **TIGHT)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_long_prefill_expands_and_short_ones_absorb(backend: str, monkeypatch) -> None:
    layer = make(kv_lora_rank=96, backend=backend)
    x = torch.randn(1, 2 * TILE, HIDDEN)
    plain, exact = layer(x).detach(), copy.deepcopy(layer).double()(x.double()).detach()
    calls: list[str] = []

    def spy(name: str) -> None:
        original = getattr(kk, name)

        def noted(*args, **options):
            calls.append(name)
            return original(*args, **options)

        monkeypatch.setattr(f"kexue_kernels.nn.mla.attention.{name}", noted)

    spy("mla_attention")
    spy("mla_decode")
    for parts, names in (
        ([2 * TILE], ["mla_attention"]),
        ([TILE, TILE - 1, 1], ["mla_attention", "mla_decode", "mla_decode"]),
        ([1, 2 * TILE - 1], ["mla_decode"] * 2),
    ):
        cache, ids = empty_cache(layer, 1)
        calls.clear()
        with torch.no_grad():
            found = [layer(part, cache.select(ids)) for part in x.split(parts, 1)]
        assert calls == names
        check_as_near([torch.cat(found, 1)], [plain], [exact])


def test_cost() -> None:
    sizes = {"dk": 128, "dr": 64, "dv": 128, "dc": 512}
    assert [T for T in range(1, 200) if expanding_is_cheaper(T, 0, **sizes)] == [
        *range(49, 65), *range(85, 200),
    ]  # fmt: skip
    assert expanding_is_cheaper(10**6, 0, **sizes)
    assert not expanding_is_cheaper(10**6, 1, **sizes)
    assert not expanding_is_cheaper(10**6, 0, dk=64, dr=8, dv=64, dc=32)


def test_a_step_in_fixed_tensors() -> None:
    """What a graph replays: the same tensors, changed in place."""
    layer = make()
    x = torch.randn(2, 12, HIDDEN)
    expected, (cache, ids) = layer(x), empty_cache(layer, 2)
    with torch.no_grad():
        found = [layer(x[:, :4], cache.select(ids))]
        step = DecodeStep(cache.select(ids), tokens=2, max_blocks=3)
        pointers = [tensor.data_ptr() for tensor in step.tensors]
        for begin in range(4, 12, 2):
            step.advance()
            found.append(layer(x[:, begin : begin + 2], step))
    check_near(torch.cat(found, 1), expected)
    assert pointers == [tensor.data_ptr() for tensor in step.tensors]
    with pytest.raises(ValueError, match="max_blocks: expected pages for 14 tokens, got 3 of 4"):
        step.advance()
    assert cache.length(ids[0]) == 12


def test_a_step_reads_nothing_back(monkeypatch) -> None:
    """What the layer itself does can be captured; the operators are tested on their own."""
    layer = make(rope_scaling={**YARN, "type": "dynamic", "factor": 2.0})
    cache, ids = empty_cache(layer, 2)
    step, called = DecodeStep(cache.select(ids)), []
    module = "kexue_kernels.nn.mla.attention"
    monkeypatch.setattr(f"{module}.mla_cache_append", lambda *args, **options: None)
    monkeypatch.setattr(f"{module}.mla_decode", lambda q, *args, **options: q[..., :DC])

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.name().removeprefix("aten::"))
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 1, HIDDEN)
    with torch.no_grad(), Recorded():
        layer(x, step)
    assert "addmm" in called or "mm" in called
    for name in ("_local_scalar_dense", "nonzero", "lift_fresh", "equal", "is_nonzero"):
        assert name not in called


def test_before_the_first_step_nothing_is_written() -> None:
    layer = make()
    cache, ids = empty_cache(layer, 2)
    step = DecodeStep(cache.select(ids))
    with torch.no_grad():
        y = layer(torch.randn(2, 1, HIDDEN), step)
    assert torch.equal(y, torch.zeros_like(y))
    assert not cache.kv_cache.any()


def test_a_full_cache_changes_nothing() -> None:
    layer = make()
    cache, ids = empty_cache(layer, 2, num_blocks=3)
    with torch.no_grad():
        layer(torch.randn(2, 3, HIDDEN), cache.select(ids))
        before = cache.kv_cache.clone()
        with pytest.raises(kk.CacheFullError):
            layer(torch.randn(2, 3, HIDDEN), cache.select(ids))
    assert torch.equal(cache.kv_cache, before)
    assert cache.cache_seqlens(ids).tolist() == [3, 3]


def test_nothing() -> None:
    layer = make()
    assert layer(torch.randn(2, 0, HIDDEN)).shape == (2, 0, HIDDEN)
    assert layer(torch.randn(0, 3, HIDDEN)).shape == (0, 3, HIDDEN)
    cache, ids = empty_cache(layer, 2)
    with torch.no_grad():
        assert layer(torch.randn(2, 0, HIDDEN), cache.select(ids)).shape == (2, 0, HIDDEN)
    assert cache.cache_seqlens(ids).tolist() == [0, 0]


def test_only_latents_are_kept_for_the_backward() -> None:
    """Of what grows with the heads: queries, the turned ones again, outputs, log-sum-exps."""
    H, T = 32, 40
    layer = Layer(
        HIDDEN, H, q_lora_rank=10, kv_lora_rank=DC, qk_nope_head_dim=DK, qk_rope_head_dim=DR,
        v_head_dim=DV,
    )  # fmt: skip
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(torch.randn(1, T, HIDDEN))
    assert y.requires_grad
    needed, keys_and_values = (DK + DR) + DR + DV + 1, (DK + DR) + DV
    assert needed <= sum(kept.values()) / (4 * T * H) < needed + keys_and_values / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_module_decodes(dtype: torch.dtype) -> None:
    layer = make(dtype)
    x = torch.randn(2, 20, HIDDEN).to(dtype)
    exact = naive(copy.deepcopy(layer).double(), x.double())
    plain = naive(layer, x)
    cache, ids = empty_cache(layer, 2)
    with torch.no_grad():
        found = [layer(part, cache.select(ids)) for part in x.split([10, 1, 9], 1)]
    check_as_near([torch.cat(found, 1)], [plain], [exact])
    angles = layer.rope.frequencies
    assert angles.dtype == torch.float32
    assert torch.equal(angles, RotaryAngles(DR).frequencies)


def test_cache_of_8_bit_floats() -> None:
    """A code is at most 2**-4 off, relative to its number."""
    layer = make(torch.bfloat16, kv_lora_rank=128).requires_grad_(False)
    x = torch.randn(2, 20, HIDDEN).bfloat16()
    found = []
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        cache = kk.nn.PagedLatentCache(20, 4, 128, DR, dtype=dtype)
        batch = cache.select([cache.allocate(), cache.allocate()])
        found.append(torch.cat([layer(part, batch) for part in x.split([18, 1, 1], 1)], 1).float())
    plain, coarse = found
    assert 0 < (coarse - plain).norm() < 2**-4 * plain.norm()


def test_autocast() -> None:
    layer = make()
    x = torch.randn(2, 20, HIDDEN)
    exact = naive(copy.deepcopy(layer).double(), x.double())
    for given in (x, x.bfloat16()):
        for cached in (torch.float32, torch.bfloat16):
            cache = kk.nn.PagedLatentCache(20, 4, DC, DR, dtype=cached)
            batch = cache.select([cache.allocate(), cache.allocate()])
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = layer(given)
                with torch.no_grad():
                    steps = torch.cat([layer(part, batch) for part in given.split([18, 2], 1)], 1)
            for result in (y, steps):
                assert result.dtype == given.dtype
                assert (result - exact).abs().max() <= 8 * 2**-7 * exact.abs().max()
            assert all(g.dtype == torch.float32 for g in gradients([y], [*layer.parameters()]))


def test_compiles_whole() -> None:
    layer = make(rope_scaling=YARN)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for T in (9, 14, 11):  # from the second time on for any T
        x = torch.randn(2, T, HIDDEN, requires_grad=True)
        inputs = [x, *layer.parameters()]
        y, expected = compiled(x, position_ids=torch.arange(T).expand(2, T)), layer(x)
        check_near(y, expected)
        for found, true in zip(gradients([y], inputs), gradients([expected], inputs), strict=True):
            check_near(found, true)


def test_built_on_the_meta_device_then_materialised() -> None:
    expected = make(seed=1, rope_scaling=YARN)
    with torch.device("meta"):
        in_context = make(rope_scaling=YARN)
    x = torch.randn(2, 9, HIDDEN)
    for layer in (make(device="meta", rope_scaling=YARN), in_context):
        assert all(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))
        layer = layer.to_empty(device="cpu")
        layer.load_state_dict(expected.state_dict())
        assert torch.equal(layer(x), expected(x))
    assigned = make(device="meta", rope_scaling=YARN)
    assigned.load_state_dict(expected.state_dict(), assign=True)
    assert torch.equal(assigned(x), expected(x))


def test_inference_mode() -> None:
    layer, x = make(), torch.randn(2, 5, HIDDEN)
    expected, (cache, ids) = layer(x), empty_cache(layer, 2)
    with torch.inference_mode():
        inner, inner_ids = empty_cache(layer, 2)
        for batch in (cache.select(ids), inner.select(inner_ids)):
            check_near(torch.cat([layer(x[:, :4], batch), layer(x[:, 4:], batch)], 1), expected)
