"""The configuration of a Transformers model, in the layer's words."""

from typing import Any


def options_of(config: Any) -> dict[str, Any]:
    """What `MultiheadLatentAttention` takes, of a DeepseekV2Config or DeepseekV3Config."""
    if not hasattr(config, "kv_lora_rank"):
        kind = type(config).__name__
        raise TypeError(f"config: expected a DeepseekV2Config or DeepseekV3Config, got {kind}")
    if getattr(config, "attention_dropout", 0.0):
        raise ValueError(f"config: expected attention_dropout 0, got {config.attention_dropout}")
    ranks = "hidden_size", "q_lora_rank", "kv_lora_rank"
    widths = "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"
    theta, scaling = _rope(config)
    return {
        **{name: getattr(config, name) for name in (*ranks, *widths)},
        "num_heads": config.num_attention_heads,
        "rope_theta": theta,
        "rope_interleaved": getattr(config, "rope_interleave", True),  # V2: always
        "rope_scaling": scaling,
        "bias": config.attention_bias,
    }


def _rope(config: Any) -> tuple[float, dict[str, object]]:
    """rope_theta and rope_scaling: in one dict from Transformers 5 on."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    scaling = dict(parameters or {})
    theta = scaling.pop("rope_theta", None) or config.rope_theta
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "dynamic":  # there it is the model's context that is stretched
        scaling["original_max_position_embeddings"] = config.max_position_embeddings
    return theta, scaling
