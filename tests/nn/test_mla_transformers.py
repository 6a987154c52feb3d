"""kk.nn.MultiheadLatentAttention with the weights of Transformers' modules: the same outputs."""

from importlib import import_module

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import kexue_kernels as kk
from kexue_kernels.nn.mla import RotaryAngles
from tests.nn.parts import gradients
from tests.nn.test_mla import YARN, empty_cache

transformers = pytest.importorskip("transformers")

HIDDEN = 24
DEFAULT = {"rope_type": "default"}
SCALINGS = [
    DEFAULT,
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.0},
    YARN,
    {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
]
CASES = [
    ("V3", {"q_lora_rank": 10, "rope_scaling": YARN}),
    ("V3", {"q_lora_rank": None, "attention_bias": True, "rope_interleave": False}),
    ("V3", {"q_lora_rank": 10, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    ("V2", {"q_lora_rank": 10, "attention_bias": True}),
    ("V2", {"q_lora_rank": None, "rope_scaling": YARN}),
]


def theirs(version: str, **options) -> tuple[nn.Module, nn.Module]:
    """The attention of a tiny model, its weights and norms drawn at random, and its angles."""
    torch.manual_seed(0)
    config = getattr(transformers, f"Deepseek{version}Config")(
        hidden_size=HIDDEN, num_attention_heads=3, num_key_value_heads=3, kv_lora_rank=12,
        qk_nope_head_dim=8, v_head_dim=6, max_position_embeddings=16,
        rope_scaling=dict(options.pop("rope_scaling", DEFAULT)),  # which they change
        **{"qk_rope_head_dim": 4, **options},
    )  # fmt: skip
    config._attn_implementation = "eager"
    name = version.lower()
    module = import_module(f"transformers.models.deepseek_{name}.modeling_deepseek_{name}")
    attention = getattr(module, f"Deepseek{version}Attention")(config, 0)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attention, getattr(module, f"Deepseek{version}RotaryEmbedding")(config)


def run(attention: nn.Module, rotary: nn.Module, x: Tensor) -> Tensor:
    T = x.shape[1]
    mask = torch.full((T, T), -torch.inf, dtype=x.dtype).triu(1)[None, None]
    angles = rotary(x, torch.arange(T)[None])
    return attention(x, position_embeddings=angles, attention_mask=mask)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("version", "options"), CASES, ids=str)
def test_same_outputs_and_gradients(
    version: str, options: dict[str, object], dtype: torch.dtype
) -> None:
    attention, rotary = theirs(version, **options)
    layer = kk.nn.MultiheadLatentAttention.from_config(attention.config)
    layer.load_state_dict(attention.state_dict())
    attention, layer = attention.to(dtype), layer.to(dtype)
    # in float64 too, their norms and V2's rotation are float32
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-5, "atol": 2e-6}
    )
    x = torch.randn(2, 20, HIDDEN, dtype=dtype, requires_grad=True)
    y, expected = layer(x), run(attention, rotary, x)
    assert_close(y, expected, **tolerance)
    mine, own = dict(layer.named_parameters()), dict(attention.named_parameters())
    assert mine.keys() == own.keys()
    found = gradients([y], [x, *mine.values()])
    assert_close(found, gradients([expected], [x, *(own[k] for k in mine)]), rtol=1e-4, atol=1e-4)
    if layer.rope.scaling.rope_type == "dynamic":
        return  # a longer sequence turns its new keys by other angles than the cached ones
    cache, ids = empty_cache(layer, 2)
    with torch.no_grad():
        parts = [layer(part, cache.select(ids)) for part in x.split([15, 1, 4], 1)]
    assert_close(torch.cat(parts, 1), expected, **tolerance)


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("dr", [4, 64])
def test_same_angles(dr: int, scaling: dict[str, object]) -> None:
    attention, rotary = theirs("V3", qk_rope_head_dim=dr, rope_scaling=scaling)
    layer = kk.nn.MultiheadLatentAttention.from_config(attention.config)
    positions = torch.arange(200)[None]
    expected = rotary(torch.zeros(1), positions)
    for found, cat in zip(layer.rope(positions), expected, strict=True):
        # roundings of frequencies, times the last position
        assert_close(found, cat[..., : dr // 2], rtol=0, atol=200 * 2**-22)
    assert layer.softmax_scale == pytest.approx(attention.scaling, rel=1e-12)


def test_ntk_is_dynamic_at_a_length_of_factor_contexts() -> None:
    """Peng et al.: theta factor**(d / (d - 2)), where dynamic's own factor is reached."""
    fixed = RotaryAngles(8, 100.0, {"rope_type": "ntk", "factor": 3.0})
    dynamic = {"rope_type": "dynamic", "factor": 1.0, "original_max_position_embeddings": 10}
    positions = torch.arange(30)[None]
    assert_close(fixed(positions), RotaryAngles(8, 100.0, dynamic)(positions), rtol=0, atol=1e-5)
    lowest = 100.0 ** (-6 / 8) / 3  # interpolated as a whole; the highest is left alone
    assert fixed.frequencies[-1].item() == pytest.approx(lowest, rel=1e-6)
    assert fixed.frequencies[0].item() == 1


def test_dynamic_is_by_sequence() -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 10}
    rope, short = RotaryAngles(8, 100.0, scaling), torch.arange(9)
    cos, sin = rope(torch.stack([short, short + 20]))
    plain = RotaryAngles(8, 100.0)
    assert_close((cos[0], sin[0]), plain(short))
    assert (cos[1] - plain(short + 20)[0]).abs().max() > 0.1


def test_attention_dropout_is_refused() -> None:
    config = theirs("V3")[0].config
    config.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"config: expected attention_dropout 0, got 0\.1"):
        kk.nn.MultiheadLatentAttention.from_config(config)
