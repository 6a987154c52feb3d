"""A Mamba-130m-shaped model with random weights, before and after `kk.patch`: end to end."""

import copy
import functools
import importlib
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

import kexue_kernels as kk
from kexue_kernels.benchmarks.case import Case, Contestant
from kexue_kernels.benchmarks.goals import Goal, faster
from kexue_kernels.benchmarks.roof import short

TRANSFORMERS = "Transformers"
HIDDEN, INNER, STATE, RANK, VOCABULARY, LAYERS = 768, 1536, 16, 48, 50280, 24
LAYER = HIDDEN * 2 * INNER + INNER * (RANK + 2 * STATE) + RANK * INNER + INNER * HIDDEN

Run = Callable[[Any, Tensor], Tensor]


def cases(device: torch.device) -> list[Case]:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    steps = 32 if device.type == "cpu" else 128
    # unpatched, training takes long on CPU
    training = (1, 128, 4) if device.type == "cpu" else (8, 2048, LAYERS)
    goals = (faster(TRANSFORMERS, 4), faster(TRANSFORMERS, 1.5)) if device.type == "cpu" else None
    return [
        _case("prefill", (1, 2048, LAYERS), dtype, _prefill, goals[:1] if goals else ()),
        _case("generation", (1, steps, LAYERS), dtype, _generate, goals[1:] if goals else ()),
        _case("training", training, dtype, _train),
    ]


def _case(
    kind: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    run: Run,
    goals: tuple[Goal, ...] = (),
) -> Case:
    """`run` on a model and embeddings [batch, tokens, HIDDEN]; its output is compared."""
    batch, tokens, layers = shape
    head = VOCABULARY * HIDDEN
    weights = layers * LAYER + head
    read_out = batch * (1 if kind == "prefill" else tokens)  # tokens that get logits
    passes = tokens if kind == "generation" else 1
    backward = 3 if kind == "training" else 1
    contestant = functools.partial(_contestant, layers=layers, run=run)
    outputs = {"prefill": (batch, 1, VOCABULARY), "generation": (batch, tokens, VOCABULARY)}
    return Case(
        name=f"mamba-130m {kind} {short(dtype)} [{batch}, {tokens}] {layers} layers",
        op="mamba",
        direction="forward",
        shape={"batch": batch, "tokens": tokens, "layers": layers},
        dtype=dtype,
        bytes=passes * backward * weights * dtype.itemsize,
        flops=2 * backward * (batch * tokens * layers * LAYER + read_out * head),
        counted="bytes: every weight once a pass over the model; FLOPs: 2 a weight and token, the "
        "output's for tokens that get logits; training: three times both",
        result_bytes=prod(outputs.get(kind, (HIDDEN,))) * 4,
        output_shape=outputs.get(kind, (2 * INNER, HIDDEN)),
        make=lambda device: {"embeddings": _embeddings((batch, tokens), dtype, device)},
        reference=contestant("reference", patched=False),
        contestants=(
            contestant("kexue patched", patched=True),
            contestant(TRANSFORMERS, patched=False),
        ),
        steps=tokens * layers * 8,
        goals=goals,
        priority=1,
    )


def _embeddings(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn((*shape, HIDDEN), generator=generator, device=device).to(dtype)


def _contestant(name: str, *, layers: int, run: Run, patched: bool) -> Contestant:
    def load() -> Callable[[Tensor], Tensor]:
        return lambda x: run(_model(layers, x.dtype, x.device, patched), x)

    return Contestant(name, load, ours=patched, package="transformers", slow=True)


@functools.lru_cache(maxsize=3)
def _model(layers: int, dtype: torch.dtype, device: torch.device, patched: bool) -> Any:
    if patched:
        model = copy.deepcopy(_model(layers, dtype, device, False))
        kk.patch(model)
        return model
    transformers = importlib.import_module("transformers")
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        state_size=STATE,
        num_hidden_layers=layers,
        time_step_rank=RANK,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.MambaForCausalLM(config)
    return model.to(device, dtype).eval()


@torch.no_grad()
def _prefill(model: Any, embeddings: Tensor) -> Tensor:
    output: Tensor = model(inputs_embeds=embeddings, use_cache=True, logits_to_keep=1).logits
    return output


@torch.no_grad()
def _generate(model: Any, embeddings: Tensor) -> Tensor:
    """A token at a time; which ones follow does not depend on the model, so that all agree."""
    cache, logits = None, []
    for t in range(embeddings.shape[1]):
        step = embeddings[:, t : t + 1]
        output = model(inputs_embeds=step, use_cache=True, cache_params=cache)
        cache = output.cache_params
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@torch.enable_grad()
def _train(model: Any, embeddings: Tensor) -> Tensor:
    """Gradients of every weight; the first one's is the output."""
    model.zero_grad(set_to_none=True)
    logits = model(inputs_embeds=embeddings, use_cache=False).logits
    logits.float().logsumexp(-1).mean().backward()
    grad: Tensor = model.backbone.layers[0].mixer.in_proj.weight.grad
    return grad.detach()
