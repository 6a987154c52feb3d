"""kk.patch on tiny Mamba and FalconMamba models with random weights: the same as before it."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kexue_kernels import _extension
from kexue_kernels.integrations import PatchReport, patch, unpatch

transformers = pytest.importorskip("transformers")

KINDS = ["Mamba", "FalconMamba"]
PATHS = ["backbone.layers.0.mixer", "backbone.layers.1.mixer"]


def make(kind: str, seed: int = 0, **options) -> nn.Module:
    """Hidden 32, two layers, 64 tokens; weights large enough for the text to depend on them."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **options,
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "A_log" not in name:
                parameter.mul_(3)
    return model


def twins(kind: str, **options) -> tuple[nn.Module, nn.Module]:
    """The original and a patched copy."""
    model = make(kind, **options)
    other = copy.deepcopy(model)
    assert len(patch(other).replaced) == 2
    return model, other


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 64, (batch, length), generator=generator)


def check_logits(model: nn.Module, patched: nn.Module, ids: Tensor, **options) -> None:
    """At most twice as far from float64 as the original, or a few roundings."""
    exact = copy.deepcopy(model).double()
    for layer in exact.backbone.layers:
        layer.residual_in_fp32 = False
    with torch.no_grad():
        true, plain, ours = (m(ids, **options).logits.double() for m in (exact, model, patched))
    allowed = 2 * (plain - true).abs().max() + 1e-6 * true.abs().max()
    assert (ours - true).abs().max() <= allowed


def check_close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest: two layers of float32 sums in another order."""
    assert_close(got, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def gradients(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 3, 40])
def test_same_logits(kind: str, length: int):
    model, patched = twins(kind)
    check_logits(model, patched, tokens(2, length))
    check_logits(model, patched, tokens(2, length), use_cache=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 17])  # also shorter than the convolution
def test_same_greedy_text(kind: str, length: int):
    model, patched = twins(kind)
    ids = tokens(2, length)
    options = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    text = model.generate(ids, **options)
    assert len(set(text[0].tolist())) > 4  # not a loop of one token
    assert_close(patched.generate(ids, **options), text)
    assert_close(patched.generate(ids, use_cache=False, **options), text)


@pytest.mark.parametrize("kind", KINDS)
def test_same_text_with_beams(kind: str):
    model, patched = twins(kind)
    ids = tokens(2, 5)
    options = {
        "max_new_tokens": 12,
        "num_beams": 3,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
    }
    assert_close(patched.generate(ids, **options), model.generate(ids, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_left_padding(kind: str):
    """A padded row gives what it gives alone, as the original does."""
    model, patched = twins(kind, use_bias=True)
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    ids = ids * mask
    check_logits(model, patched, ids, attention_mask=mask)
    options = {"max_new_tokens": 10, "do_sample": False}
    text = patched.generate(ids, attention_mask=mask, **options)
    assert_close(text, model.generate(ids, attention_mask=mask, **options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_same_gradients(kind: str, training: bool):
    model, patched = (m.train(training) for m in twins(kind))
    ids = tokens(2, 21)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected, got = gradients(model, ids, mask), gradients(patched, ids, mask)
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        check_close(got[name], gradient, 1e-4)


def test_gradient_checkpointing():
    model, patched = (m.train() for m in twins("Mamba"))
    patched.gradient_checkpointing_enable()
    ids = tokens(2, 11)
    expected, got = gradients(model, ids), gradients(patched, ids)
    for name, gradient in expected.items():
        check_close(got[name], gradient, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"use_bias": True},
        {"use_conv_bias": False},
        {"hidden_act": "gelu"},
        {"conv_kernel": 2, "expand": 3, "time_step_rank": 5},
    ],
)
def test_configurations(kind: str, options: dict[str, object]):
    model, patched = twins(kind, **options)
    ids = tokens(2, 15)
    generation = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    check_logits(model, patched, ids)
    assert_close(patched.generate(ids, **generation), model.generate(ids, **generation))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind: str):
    model, patched = (m.to(torch.bfloat16) for m in twins(kind))
    ids = tokens(2, 30)
    check_logits(model, patched, ids)
    with torch.no_grad():
        expected = patched(ids).logits[:, -1:]
        cache = patched(ids[:, :-1], use_cache=True).cache_params
        step = patched(ids[:, -1:], cache_params=cache).logits
    check_close(step, expected, 4 * torch.finfo(torch.bfloat16).eps)


def test_autocast():
    model, patched = twins("Mamba")
    ids = tokens(2, 30)
    with torch.no_grad():
        true = model(ids).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            plain, ours = model(ids).logits, patched(ids).logits
    assert (ours - true).norm() <= 2 * (plain - true).norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [False, True])
def test_one_token_at_a_time_is_the_whole(kind: str, grad: bool):
    _, patched = twins(kind)
    ids = tokens(2, 9)
    with torch.set_grad_enabled(grad):
        whole = patched(ids).logits
        cache, steps = None, []
        for token in ids.split(1, dim=1):
            out = patched(token, cache_params=cache, use_cache=True)
            cache = out.cache_params
            steps.append(out.logits)
    check_close(torch.cat(steps, 1), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_chunked_prefill_is_the_whole(kind: str):
    _, patched = twins(kind)
    ids = tokens(2, 20)
    with torch.no_grad():
        whole = patched(ids).logits
        cache, parts = None, []
        for part in ids.split([7, 2, 1, 10], dim=1):
            out = patched(part, cache_params=cache, use_cache=True)
            cache = out.cache_params
            parts.append(out.logits)
    check_close(torch.cat(parts, 1), whole)


def test_caches_are_exchangeable():
    """What one has read, in one go and by steps, the other goes on from."""
    model, patched = twins("Mamba")
    ids = tokens(2, 10)
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
        for first, second in ((model, patched), (patched, model)):
            cache = first(ids[:, :-3], use_cache=True).cache_params
            for position, m in ((-3, first), (-2, second)):
                m(ids[:, position : position + 1], cache_params=cache)
            logits = first(ids[:, -1:], cache_params=cache).logits[:, -1]
            check_close(logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode(kind: str):
    model, patched = twins(kind)
    ids = tokens(1, 6)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        text = patched.generate(ids, **options)
    assert_close(text, model.generate(ids, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_a_layer_is_one_call(kind: str, monkeypatch):
    if _extension.load().module is None:
        pytest.skip(_extension.load().reason)
    from kexue_kernels.scan import cpu_mamba

    model, patched = twins(kind, use_bias=True)
    ids, made, real = tokens(2, 9), [], cpu_mamba.step
    monkeypatch.setattr(cpu_mamba, "step", lambda *given: (made.append(1), real(*given)))
    with torch.no_grad():
        cache = patched(ids[:, :-2], use_cache=True).cache_params
        steps = [patched(t, cache_params=cache).logits for t in ids[:, -2:].split(1, dim=1)]
        expected = model(ids).logits[:, -2:]
    assert len(made) == 2 * len(PATHS)
    check_close(torch.cat(steps, 1), expected)


@pytest.mark.parametrize("change", ["in place", "loaded", "exchanged"])
def test_steps_see_changed_weights(change: str):
    """What a step prepares of the parameters is prepared anew when they change."""
    model, patched = twins("Mamba")
    ids = tokens(2, 10)
    with torch.no_grad():
        caches = [m(ids[:, :-2], use_cache=True).cache_params for m in (model, patched)]
        for m, cache in zip((model, patched), caches, strict=True):
            m(ids[:, -2:-1], cache_params=cache)
            mixer = m.backbone.layers[0].mixer
            if change == "in place":
                mixer.A_log.add_(1)
                mixer.conv1d.weight.mul_(2)
            elif change == "loaded":
                m.load_state_dict(make("Mamba", seed=3).state_dict())
            else:
                mixer.A_log = nn.Parameter(mixer.A_log + 1)
        steps = [
            m(ids[:, -1:], cache_params=cache).logits
            for m, cache in zip((model, patched), caches, strict=True)
        ]
    check_close(steps[1], steps[0])


def test_training_goes_through_a_cache():
    """Truncated backpropagation across a call boundary is the whole sequence's gradient."""
    _, patched = twins("Mamba")
    ids = tokens(2, 10)
    whole = torch.autograd.grad(patched(ids).logits[:, -1].sum(), list(patched.parameters()))
    cache = patched(ids[:, :6], use_cache=True).cache_params
    logits = patched(ids[:, 6:], cache_params=cache, use_cache=True).logits[:, -1]
    parts = torch.autograd.grad(logits.sum(), list(patched.parameters()))
    for expected, got in zip(whole, parts, strict=True):
        check_close(got, expected, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_report_and_round_trip(kind: str):
    model = make(kind)
    weights = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    keys, mixer = list(model.state_dict()), model.backbone.layers[0].mixer
    original, text = type(mixer), repr(model)
    report = patch(model)
    assert report == PatchReport([(path, f"{kind}Mixer") for path in PATHS], [])
    assert model.backbone.layers[0].mixer is mixer
    assert isinstance(mixer, original)
    assert type(mixer) is not original
    assert list(model.state_dict()) == keys
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == weights
    assert repr(model) == text
    again = patch(model)
    assert again == PatchReport([], [(path, "already patched") for path in PATHS])
    assert "2 skipped" in str(again)
    unpatch(model)
    assert type(mixer) is original
    assert "forward" not in mixer.__dict__
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == weights
    unpatch(model)  # nothing to do
    assert type(mixer) is original
    assert len(patch(model).replaced) == 2


def test_by_instance():
    model, other = make("Mamba"), make("Mamba")
    patch(model)
    assert (
        type(other.backbone.layers[0].mixer).forward
        is not type(model.backbone.layers[0].mixer).forward
    )
    assert patch(other.backbone.layers[0]).replaced == [("mixer", "MambaMixer")]


def test_save_and_load(tmp_path):
    model, patched = twins("Mamba")
    patched.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    ids = tokens(1, 8)
    with torch.no_grad():
        expected = model(ids).logits
        assert_close(loaded(ids).logits, expected)
        patched.load_state_dict(make("Mamba", seed=5).state_dict())
        assert not torch.allclose(patched(ids).logits, expected)
        patched.load_state_dict(model.state_dict())
        check_close(patched(ids).logits, expected)


def test_copies_and_pickles_stay_patched():
    _, patched = twins("Mamba")
    ids = tokens(1, 8)
    with torch.no_grad():
        expected = patched(ids).logits
        for other in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
            assert type(other.backbone.layers[1].mixer) is type(patched.backbone.layers[1].mixer)
            assert_close(other(ids).logits, expected, rtol=0, atol=0)
            unpatch(other)
            assert len(patch(patched).skipped) == 2


def test_what_is_left_alone():
    model = make("Mamba")
    first, second = (layer.mixer for layer in model.backbone.layers)
    first.forward = first.forward
    second.dt_proj._hf_hook = object()
    report = patch(model)
    assert report.replaced == []
    assert [path for path, _ in report.skipped] == PATHS
    assert "on the instance" in report.skipped[0][1]
    assert "Accelerate" in report.skipped[1][1]

    class Own(type(make("Mamba").backbone.layers[0].mixer)):
        pass

    model = make("Mamba")
    model.backbone.layers[0].mixer.__class__ = Own
    model.backbone.layers[1].mixer.conv1d = nn.Identity()
    report = patch(model)
    assert "Own is a subclass of MambaMixer" in report.skipped[0][1]
    assert "conv1d is a Identity" in report.skipped[1][1]


def test_recorded_pasts_are_the_originals_matter(notes):
    model, patched = twins("Mamba")
    ids = tokens(1, 6)
    with torch.no_grad():
        caches = []
        for m in (model, patched):
            cache = transformers.DynamicCache(config=m.config)
            for layer in cache.layers:
                layer.activate_past_recording()
            caches.append(m(ids, cache_params=cache, use_cache=True).cache_params)
    for mine, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
        assert mine.conv_states[0].shape[-1] == 6
        check_close(mine.conv_states[0], theirs.conv_states[0])
    assert notes() == ["MambaMixer: left to Transformers' own code: the cache keeps its past"]


def test_compiles():
    _, patched = twins("Mamba")
    ids = tokens(2, 12)
    compiled = torch.compile(patched, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(ids, use_cache=False).logits, patched(ids, use_cache=False).logits)


def test_other_models_are_not_touched():
    assert patch(nn.Linear(2, 2)) == PatchReport([], [])


def test_bad_input(monkeypatch):
    for function in (patch, unpatch):
        with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
            function("state-spaces/mamba-130m")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match="patching needs Hugging Face Transformers"):
        patch(nn.Linear(2, 2))
