"""Tiny DeepSeek-V2 and V3 models with random weights."""

import copy

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kexue_kernels.integrations import patch

KINDS = ["V2", "V3"]


def make(kind: str, seed: int = 0, **options) -> nn.Module:
    """Hidden 32, a dense layer and one of experts, weights that make the text depend on them."""
    import transformers

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 16,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "first_k_dense_replace": 1,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": 8, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": None, "experts_implementation": "eager",
    }  # fmt: skip
    config = getattr(transformers, f"Deepseek{kind}Config")(**{**sizes, **options})
    model = getattr(transformers, f"Deepseek{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(16)
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


def padded(batch: int, length: int, pads: list[int], side: str = "left") -> tuple[Tensor, Tensor]:
    """Tokens, and a mask without `pads` of each sequence."""
    mask = torch.ones(batch, length, dtype=torch.long)
    for row, pad in zip(mask, pads, strict=True):
        row[:pad] = 0
    mask = mask if side == "left" else mask.flip(1)
    return tokens(batch, length) * mask, mask


def check_close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest: two layers of float32 sums in another order."""
    assert_close(got, expected, rtol=0, atol=tolerance * expected.abs().max().item())
