"""A small model of DeepSeek-V3's shape with random weights, before and after `kk.patch`.

Widths of a head, of latents and of keys are DeepSeek-V3's; there are fewer heads and layers, and
dense layers alone: experts cost the same before and after.
"""

import copy
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kexue_kernels as kk
from kexue_kernels.benchmarks.case import Case, Contestant, Inputs
from kexue_kernels.benchmarks.goals import Goal, faster
from kexue_kernels.benchmarks.roof import short

HIDDEN, INNER, HEADS, VOCABULARY = 1024, 2048, 16, 16384
DQ, DC, DK, DR, DV = 384, 512, 128, 64, 128  # DQ: the rank of queries, 1536 in DeepSeek-V3

TRANSFORMERS, EAGER = "Transformers", "Transformers eager"

Prepare = Callable[[Inputs], tuple[Any, ...]]


def cases(device: torch.device) -> list[Case]:
    on_cpu = device.type == "cpu"
    dtype = torch.float32 if on_cpu else torch.bfloat16
    steps, layers = (8, 4) if on_cpu else (64, 16)
    length = 1024 if on_cpu else 4096
    goals = (faster(TRANSFORMERS, 5),) if on_cpu else ()
    return [
        generation(4096, steps, layers, dtype, goals, priority=0),
        attention("prefill", length, dtype),
        attention("training", length, dtype),
    ]


def generation(
    past: int,
    steps: int,
    layers: int,
    dtype: torch.dtype,
    goals: tuple[Goal, ...] = (),
    priority: int = 1,
) -> Case:
    """`steps` tokens, one at a time, onto a cache of `past`; their logits are compared."""
    weights = layers * (_attention_weights() + 3 * HIDDEN * INNER) + VOCABULARY * HIDDEN
    rows = layers * (past + steps // 2)  # of the cache, read for a token

    def make(device: torch.device) -> dict[str, Tensor]:
        draw = functools.partial(_normal, dtype=dtype, device=device)
        return {
            "embeddings": draw(1, steps, HIDDEN),
            "latents": draw(layers, 1, 1, past, DC),
            "keys": draw(layers, 1, 1, past, DR, seed=1),
        }

    def contestant(name: str, patched: bool) -> Contestant:
        def load() -> Callable[..., Tensor]:
            return lambda x, cache: _generate(_model(layers, x.dtype, x.device, patched), x, cache)

        return Contestant(
            name, load, ours=patched, package="transformers", slow=True, prepare=_cached
        )

    return Case(
        name=f"deepseek-v3 generation {short(dtype)} [1, {steps}] {layers} layers, {past} cached",
        op="deepseek",
        direction="forward",
        shape={"batch": 1, "tokens": steps, "layers": layers, "cached": past},
        dtype=dtype,
        bytes=steps * (weights + rows * (DC + DR)) * dtype.itemsize,
        flops=2 * steps * (weights + rows * HEADS * (2 * DC + DR)),
        counted="bytes: every weight and cached row once a token; FLOPs: 2 a weight and token, and "
        "2 (576 + 512) a head, token and cached row",
        result_bytes=steps * VOCABULARY * 4,
        output_shape=(1, steps, VOCABULARY),
        make=make,
        reference=contestant("reference", False),
        contestants=(contestant("kexue patched", True), contestant(TRANSFORMERS, False)),
        steps=steps * layers * 8,
        goals=goals,
        priority=priority,
    )


def attention(kind: str, T: int, dtype: torch.dtype) -> Case:
    """One layer's attention without a cache, projections included; in training, gradients too."""
    training = kind == "training"
    pairs = HEADS * T * (T + 1) // 2
    passes = 3 if training else 1

    def contestant(name: str, patched: bool, implementation: str = "sdpa") -> Contestant:
        def load() -> Callable[[Tensor], Tensor]:
            run = _gradient if training else _attend
            return lambda x: run(_model(1, x.dtype, x.device, patched, implementation), x)

        return Contestant(name, load, ours=patched, package="transformers", slow=not patched)

    return Case(
        name=f"deepseek-v3 attention {kind} {short(dtype)} [1, {T}]",
        op="deepseek",
        direction="forward",
        shape={"batch": 1, "tokens": T, "heads": HEADS},
        dtype=dtype,
        bytes=passes * (_attention_weights() + 2 * T * HIDDEN) * dtype.itemsize,
        flops=2 * passes * (T * _attention_weights() + pairs * (DK + DR + DV)),
        counted="bytes: weights, input and output once; FLOPs: 2 a weight and token, and 2 (192 + "
        "128) a head and pair of tokens; training: three times both",
        result_bytes=T * HIDDEN * dtype.itemsize,
        output_shape=(1, T, HIDDEN),
        make=lambda device: {"x": _normal(1, T, HIDDEN, dtype=dtype, device=device)},
        reference=contestant("reference", False),
        contestants=(
            contestant("kexue patched", True),
            contestant(TRANSFORMERS, False),
            contestant(EAGER, False, "eager"),
        ),
        steps=50,
        priority=1,
    )


def _attention_weights() -> int:
    queries = HIDDEN * DQ + DQ * HEADS * (DK + DR)
    return queries + HIDDEN * (DC + DR) + HEADS * (DC * (DK + DV) + DV * HIDDEN)


def _normal(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


@functools.lru_cache(maxsize=4)
def _model(
    layers: int,
    dtype: torch.dtype,
    device: torch.device,
    patched: bool,
    implementation: str = "sdpa",
) -> Any:
    if patched:
        model = copy.deepcopy(_model(layers, dtype, device, False, implementation))
        kk.patch(model)
        return model
    transformers = importlib.import_module("transformers")
    config = transformers.DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        first_k_dense_replace=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=DQ,
        kv_lora_rank=DC,
        qk_nope_head_dim=DK,
        qk_rope_head_dim=DR,
        v_head_dim=DV,
        max_position_embeddings=8192,
        attn_implementation=implementation,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.DeepseekV3ForCausalLM(config)
    return model.to(device, dtype).eval()


def _cached(inputs: Inputs) -> tuple[Any, ...]:
    """The embeddings, and a cache of these latents and keys."""
    cache = importlib.import_module("transformers").DynamicCache()
    for layer, held in enumerate(zip(inputs["latents"], inputs["keys"], strict=True)):
        cache.update(*held, layer)
    return inputs["embeddings"], cache


@torch.no_grad()
def _generate(model: Any, embeddings: Tensor, cache: Any) -> Tensor:
    """A token at a time; which ones follow does not depend on the model, so that all agree."""
    logits = [
        model(inputs_embeds=x, past_key_values=cache, use_cache=True).logits
        for x in embeddings.split(1, dim=1)
    ]
    cache.crop(-embeddings.shape[1])  # for the next call
    return torch.cat(logits, dim=1)


@torch.no_grad()
def _attend(model: Any, x: Tensor) -> Tensor:
    return _layer(model, x)


@torch.enable_grad()
def _gradient(model: Any, x: Tensor) -> Tensor:
    """The gradient of x, and on the way of every weight."""
    model.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    _layer(model, x).square().mean().backward()
    assert x.grad is not None
    return x.grad


def _layer(model: Any, x: Tensor) -> Tensor:
    """The first layer's attention, causal."""
    T = x.shape[1]
    positions = torch.arange(T, device=x.device)[None]
    mask = None
    if model.config._attn_implementation == "eager":
        mask = torch.full((T, T), torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device)
        mask = mask.triu(1)[None, None]
    out: Tensor = model.model.layers[0].self_attn(
        hidden_states=x,
        position_embeddings=model.model.rotary_emb(x, positions),
        attention_mask=mask,
    )[0]
    return out
