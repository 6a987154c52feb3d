"""kk.patch on tiny DeepSeek-V2 and V3 models: what is left to the original, and round trips."""

import copy
import pickle
import re

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kexue_kernels.integrations import PatchReport, patch, unpatch
from tests.integrations.deepseek_toy import KINDS, check_close, make, padded, tokens, twins

transformers = pytest.importorskip("transformers")

PATHS = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
CAUSAL = torch.ones(8, 8, dtype=torch.bool).tril()
WINDOW = CAUSAL & ~CAUSAL.tril(-3)


def additive(mask: Tensor, value: float = -3.0) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, value)[None, None]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"attention_mask": WINDOW[None, None]}, "other than causal"),
        ({"attention_mask": CAUSAL.tril(-1)[None, None]}, "other than causal"),
        ({"attention_mask": additive(CAUSAL)}, "changes scores"),
        ({"attention_mask": CAUSAL.expand(2, 4, 8, 8)}, r"other axes than \[B, 1, Tq, Tk\]"),
        ({"output_attentions": True}, "weights are to be returned"),
        ({"is_causal": False}, "is_causal was given"),
    ],
    ids=["window", "strict", "additive", "heads", "weights", "not causal"],
)
def test_what_is_left_to_the_original(options: dict[str, object], reason: str, notes):
    implementation = "eager" if "output_attentions" in options else "sdpa"
    model, patched = twins("V3", attn_implementation=implementation)
    ids = tokens(2, 8)
    with torch.no_grad():
        expected, got = (m(ids, **options) for m in (model, patched))
        assert_close(got.logits, expected.logits)
        if "output_attentions" in options:
            assert_close(got.attentions, expected.attentions)
        steps = [
            m(ids[:, :1], past_key_values=out.past_key_values).logits
            for m, out in ((model, expected), (patched, got))
        ]
    check_close(steps[1], steps[0])
    assert len(notes()) == 1  # not for each layer and call
    assert re.search(reason, notes()[0])


def test_a_step_that_is_left_to_the_original(notes):
    """Its latents join those that are there."""
    model, patched = twins("V3")
    ids, mask = padded(2, 9, [0, 2])
    mask[1, 4] = 0  # inside of what is cached
    with torch.no_grad():
        logits = []
        for m in (model, patched):
            cache = m(ids[:, :7], attention_mask=mask[:, :7]).past_key_values
            m(ids[:, 7:8], attention_mask=mask[:, :8], past_key_values=cache)
            logits.append(m(ids[:, 8:], attention_mask=mask, past_key_values=cache).logits)
    check_close(logits[1], logits[0])
    assert len(notes()) == 1
    assert "between others" in notes()[0]


def test_dropout_is_left_to_the_original(notes):
    model, patched = (m.train() for m in twins("V3", attention_dropout=0.5))
    outputs = []
    for m in (model, patched):
        torch.manual_seed(3)
        outputs.append(m(tokens(2, 8)).logits)
    assert_close(outputs[1], outputs[0])
    assert "dropped out" in notes()[0]
    patched.eval()(tokens(2, 8))
    assert len(notes()) == 1


class Adapted(nn.Linear):
    """With something of its own beside the weight, as adapters have."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("change", ["class", "hook", "instance"])
def test_a_changed_projection_is_called(change: str, notes):
    model, patched = twins("V3")
    for m in (model, patched):
        linear = m.model.layers[1].self_attn.kv_b_proj
        if change == "class":
            linear.__class__ = Adapted
        elif change == "hook":
            linear.register_forward_hook(lambda module, args, out: out * 2)
        else:
            linear.forward = lambda x, linear=linear: nn.functional.linear(x, linear.weight) * 2
    with torch.no_grad():
        check_close(patched(tokens(2, 8)).logits, model(tokens(2, 8)).logits)
    assert "kv_b_proj" in notes()[0]


@pytest.mark.parametrize("kind", KINDS)
def test_report_and_round_trip(kind: str):
    model = make(kind)
    weights = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    keys, attention = list(model.state_dict()), model.model.layers[0].self_attn
    original, text = type(attention), repr(model)
    report = patch(model)
    assert report == PatchReport([(path, f"Deepseek{kind}Attention") for path in PATHS], [])
    assert isinstance(attention, original)
    assert type(attention) is not original
    assert list(model.state_dict()) == keys
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == weights
    assert repr(model) == text
    assert patch(model) == PatchReport([], [(path, "already patched") for path in PATHS])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.model.layers[1].self_attn) is type(attention)
    unpatch(model)
    assert type(attention) is original
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == weights


def test_what_is_left_alone():
    model = make("V3")
    first, second = (layer.self_attn for layer in model.model.layers)
    first.kv_b_proj = nn.Identity()
    second.o_proj._hf_hook = object()
    report = patch(model)
    assert report.replaced == []
    assert "kv_b_proj is a Identity" in report.skipped[0][1]
    assert "Accelerate" in report.skipped[1][1]
    second.o_proj._hf_hook = type("AlignDevicesHook", (), {"offload": False})()
    assert len(patch(model).replaced) == 1


def test_compiles(notes):
    """Without a mask in one graph; with one, or onto a cache, through the original's code."""
    _, patched = twins("V3")
    attention, rotary = patched.model.layers[0].self_attn, patched.model.rotary_emb
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))

    def call(function, begin: int, end: int, mask: Tensor | None = None, cache=None) -> Tensor:
        positions = rotary(x, torch.arange(begin, end)[None])
        return function(x[:, begin:end], positions, attention_mask=mask, past_key_values=cache)[0]

    with torch.no_grad():
        compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
        whole = call(attention, 0, 6)
        check_close(call(compiled, 0, 6), whole)
        compiled = torch.compile(attention, backend="eager", fullgraph=True)
        mask = CAUSAL[:6, :6][None, None]
        check_close(call(compiled, 0, 6, mask), whole)
        cache = transformers.DynamicCache()
        check_close(call(attention, 0, 5, cache=cache), whole[:, :5])
        check_close(call(compiled, 5, 6, cache=cache), whole[:, 5:])
    assert notes() == []
