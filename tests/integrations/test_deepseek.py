"""kk.patch on tiny DeepSeek-V2 and V3 models: logits, text and gradients as before it."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.integrations.deepseek_toy import KINDS, check_close, padded, tokens, twins

pytest.importorskip("transformers")


def check_logits(model: nn.Module, patched: nn.Module, ids: Tensor, **options) -> None:
    """At most twice as far from float64 as the original, or a few roundings."""
    exact, mask = copy.deepcopy(model).double(), options.get("attention_mask")
    exact.set_attn_implementation("sdpa")  # in float64 eager attention gives padding NaN
    with torch.no_grad():
        true, plain, ours = (m(ids, **options).logits.double() for m in (exact, model, patched))
    seen = slice(None) if mask is None or mask.ndim > 2 else mask.bool()
    allowed = 2 * (plain - true)[seen].abs().max() + 1e-6 * true.abs().max()
    assert (ours - true)[seen].abs().max() <= allowed


def check_text(model: nn.Module, patched: nn.Module, ids: Tensor, mask: Tensor, **options) -> None:
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask, **options}
    text = model.generate(ids, **options)
    assert len(set(text[0, ids.shape[1] :].tolist())) > 3  # not a loop of one token
    assert_close(patched.generate(ids, **options), text)


def gradients(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    model(ids, attention_mask=mask, labels=labels).loss.backward()
    return kept(model)


def kept(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def check_gradients(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0 or "experts" in name, name
        check_close(got[name], gradient, tolerance)


def latents(model: nn.Module, monkeypatch) -> None:
    """From here on keys and values of a cache may not be expanded."""

    def refuse(*_):
        raise AssertionError("expanded")

    for layer in model.model.layers:
        monkeypatch.setattr(layer.self_attn, "expand_kv", refuse)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_same_logits(kind: str, implementation: str, notes, monkeypatch):
    model, patched = twins(kind, attn_implementation=implementation)
    latents(patched, monkeypatch)
    for length in (1, 7):
        check_logits(model, patched, tokens(2, length))
        check_logits(model, patched, tokens(2, length), use_cache=False)
    for side in ("left", "right"):
        ids, mask = padded(3, 9, [4, 0, 2], side)
        check_logits(model, patched, ids, attention_mask=mask)
    mask[0, 3] = 0  # a hole, too
    check_logits(model, patched, ids, attention_mask=mask)
    assert notes() == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_same_greedy_text(kind: str, implementation: str, notes, monkeypatch):
    model, patched = twins(kind, attn_implementation=implementation)
    latents(patched, monkeypatch)
    ids, mask = padded(3, 9, [4, 0, 2])
    check_text(model, patched, ids, mask)
    check_text(model, patched, ids[1:2], mask[1:2])
    check_text(model, patched, ids[:, :1] + 1, torch.ones(3, 1, dtype=torch.long))
    assert notes() == []


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2, "use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},  # several tokens a step, of which some are cropped
        {"prefill_chunk_size": 4},
    ],
    ids=lambda options: next(iter(options)),
)
def test_ways_to_generate(options: dict[str, object], notes, monkeypatch):
    model, patched = twins("V3")
    latents(patched, monkeypatch)
    batch = 1 if "prompt_lookup_num_tokens" in options else 3
    ids, mask = padded(batch, 9, [0, 5, 1][:batch])
    check_text(model, patched, ids, mask, **options)
    assert notes() == []


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("V2", {"q_lora_rank": None, "attention_bias": True}),
        ("V3", {"q_lora_rank": None, "attention_bias": True}),
        ("V3", {"rope_interleave": False}),
        (
            "V3",
            {
                "rope_parameters": {
                    "rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.7,
                    "rope_theta": 1e4, "original_max_position_embeddings": 64,
                },
            },
        ),
        ("V3", {"qk_nope_head_dim": 5, "v_head_dim": 9, "kv_lora_rank": 7}),
    ],
    ids=["V2 plain queries", "V3 plain queries", "halves", "yarn", "odd widths"],
)  # fmt: skip
def test_configurations(kind: str, options: dict[str, object]):
    model, patched = twins(kind, **options)
    ids, mask = padded(2, 8, [3, 0])
    check_logits(model, patched, ids, attention_mask=mask)
    check_text(model, patched, ids, mask, max_new_tokens=6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-6)])
def test_same_gradients(kind: str, dtype: torch.dtype, tolerance: float, notes):
    """Transformers' norms are in float32 throughout."""
    for pads in (None, "left", "right"):
        model, patched = (m.to(dtype).train() for m in twins(kind))
        ids, mask = padded(3, 9, [4, 0, 2], pads or "left")
        if pads is None:
            ids, mask = tokens(2, 7), None
        check_gradients(gradients(patched, ids, mask), gradients(model, ids, mask), tolerance)
    assert notes() == []


def test_gradient_checkpointing(notes):
    model, patched = (m.train() for m in twins("V3"))
    patched.gradient_checkpointing_enable()
    ids, mask = padded(2, 7, [2, 0])
    check_gradients(gradients(patched, ids, mask), gradients(model, ids, mask), 1e-4)
    assert notes() == []


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_sequences(implementation: str, notes):
    model, patched = twins("V3", attn_implementation=implementation)
    positions = torch.cat([torch.arange(n) for n in (4, 1, 6)])[None]
    options = {"position_ids": positions, "use_cache": False}
    check_logits(model, patched, tokens(1, 11), **options)
    apart = [patched(each).logits for each in tokens(1, 11).split([4, 1, 6], 1)]
    check_close(patched(tokens(1, 11), **options).logits, torch.cat(apart, 1))
    assert notes() == []


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind: str):
    model, patched = (m.to(torch.bfloat16) for m in twins(kind))
    ids, mask = padded(2, 12, [3, 0])
    check_logits(model, patched, ids, attention_mask=mask)
    with torch.no_grad():
        expected = patched(ids, attention_mask=mask).logits[:, -1:]
        cache = patched(ids[:, :-1], attention_mask=mask[:, :-1]).past_key_values
        step = patched(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits
    check_close(step, expected, 8 * torch.finfo(torch.bfloat16).eps)


def test_autocast(notes):
    model, patched = twins("V3")
    ids, mask = padded(2, 12, [3, 0])
    seen = mask.bool()
    with torch.no_grad():
        true = model(ids, attention_mask=mask).logits[seen]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            plain, ours = (m(ids, attention_mask=mask).logits[seen] for m in (model, patched))
            cache = patched(ids[:, :-1], attention_mask=mask[:, :-1]).past_key_values
            step = patched(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits
    assert (ours - true).norm() <= 2 * (plain - true).norm()
    assert (step[:, 0] - ours[[8, 20]]).norm() <= 2 * (plain - true)[[8, 20]].norm()
    assert notes() == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [False, True])
def test_pieces_are_the_whole(kind: str, grad: bool):
    """With `grad`, what is cached carries gradients, and the original's code reads it."""
    _, patched = twins(kind)
    ids, mask = padded(2, 14, [4, 0])
    with torch.set_grad_enabled(grad):
        whole = patched(ids, attention_mask=mask).logits
        cache, parts, end = None, [], 0
        for part in ids.split([3, 6, 1, 1, 3], dim=1):
            end += part.shape[1]
            seen = mask[:, :end]
            out = patched(part, attention_mask=seen, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    check_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()])


def test_caches_are_exchangeable():
    """What one has read, in one go and by steps, the other goes on from."""
    model, patched = twins("V3")
    ids = tokens(2, 10)
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
        for first, second in ((model, patched), (patched, model)):
            cache = first(ids[:, :-3]).past_key_values
            for position, m in ((-3, first), (-2, second)):
                m(ids[:, position : position + 1], past_key_values=cache)
            logits = first(ids[:, -1:], past_key_values=cache).logits[:, -1]
            check_close(logits, expected)


def test_training_goes_through_a_cache(notes):
    """Gradients across a call boundary are the whole sequence's, also after steps without any."""
    model, patched = twins("V2")
    ids = tokens(2, 10)
    whole = torch.autograd.grad(
        patched(ids).logits[:, -1].sum(), list(patched.parameters()), allow_unused=True
    )
    assert notes() == []
    cache = patched(ids[:, :6]).past_key_values
    logits = patched(ids[:, 6:], past_key_values=cache).logits[:, -1]
    parts = torch.autograd.grad(logits.sum(), list(patched.parameters()), allow_unused=True)
    for expected, got in zip(whole, parts, strict=True):
        if expected is not None:
            check_close(got, expected, 1e-4)
    assert len(notes()) == 1
    assert "gradients go through what is cached" in notes()[0]
    for m in (model, patched):
        m.zero_grad()
        with torch.no_grad():
            cache = m(ids[:, :6]).past_key_values
        for t in (6, 7):  # the second writes after the first has saved what it read
            cache = m(ids[:, t : t + 1], past_key_values=cache).past_key_values
        m(ids[:, 8:], past_key_values=cache).logits[:, -1].sum().backward()
    check_gradients(kept(patched), kept(model), 1e-4)


def test_a_prefix_is_trained_through_a_cache():
    """Of a frozen model: nothing but what is cached carries a gradient."""
    model, patched = twins("V3")
    found = []
    for m in (model, patched):
        m.requires_grad_(False)
        prefix = torch.ones(1, 3, 32, requires_grad=True)
        cache = m(inputs_embeds=prefix).past_key_values
        m(tokens(1, 4), past_key_values=cache).logits.square().sum().backward()
        found.append(prefix.grad)
    check_close(found[1], found[0], 1e-4)


def test_a_frozen_model_is_served_with_gradients_on(notes):
    model, patched = (m.requires_grad_(False) for m in twins("V3"))
    ids, logits = tokens(2, 6), []
    for m in (model, patched):
        cache = m(ids[:, :4]).past_key_values
        m(ids[:, 4:5], past_key_values=cache)
        logits.append(m(ids[:, 5:], past_key_values=cache).logits)
    check_close(logits[1], logits[0])
    assert notes() == []


def test_inference_mode():
    """A cache that was begun in it is gone on with outside."""
    model, patched = twins("V3")
    ids, mask = padded(2, 8, [2, 0])
    with torch.inference_mode():
        check_text(model, patched, ids, mask)
        cache = patched(ids[:, :-2], attention_mask=mask[:, :-2]).past_key_values
    with torch.no_grad():
        for end in (7, 8):
            step = patched(
                ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache
            ).logits
        check_close(step, model(ids, attention_mask=mask).logits[:, -1:])
