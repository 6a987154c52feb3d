"""Attention of Transformers' DeepSeek-V2 and V3, computed from the latents.

Transformers caches latents and rotated keys, and at each call expands all of them to keys and
values of every head. Here what is not cached yet is expanded, a few heads at a time, by
`mla_attention`; what is cached is attended to as it is by `mla_decode`, with the projections
absorbed into the queries and the output.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from kexue_kernels import dispatch
from kexue_kernels.integrations.attention_masks import (
    Packing,
    RefusedMaskError,
    Windows,
    packing,
    remembered,
    windows,
)
from kexue_kernels.mla.attention import mla_attention
from kexue_kernels.mla.decode import mla_decode

SERVED = "eager", "sdpa"  # of Transformers' attention implementations: others have other masks
NOT_TAKEN = "head_mask", "is_causal", "layer_head_mask", "position_bias"  # of the arguments


class LatentAttention:
    """What both kinds share; attributes and submodules are the original's."""

    attention_dropout: float
    config: Any
    is_causal: bool
    kv_a_layernorm: nn.Module
    kv_a_proj_with_mqa: nn.Module
    kv_b_proj: nn.Linear
    kv_lora_rank: int
    layer_idx: int
    o_proj: nn.Module
    qk_head_dim: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    scaling: float
    training: bool
    v_head_dim: int
    _original: type

    def _attend(
        self, x: Tensor, positions: Any, mask: Any, cache: Any, given: dict[str, Any]
    ) -> Tensor | None:
        """x [B, T, hidden] to [B, T, hidden]; None where the original's code is to serve."""
        past = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        if torch.compiler.is_compiling():  # where neither masks nor lengths can be read
            known = mask is None and isinstance(past, int) and past == 0
            if not known or self._refusal(x, mask, given):
                return None
            return self._prefill(x, positions, cache, None)
        past = int(past)
        reason = self._refusal(x, mask, given)
        if past and torch.is_grad_enabled() and self._differentiates(x, cache):
            reason = "gradients go through what is cached"
        if not reason:
            try:
                return self._serve(x, positions, mask, cache, past)
            except RefusedMaskError as refused:
                reason = str(refused)
        dispatch.note_once(f"{self._original.__name__}: left to Transformers' own code: {reason}")
        return None

    def _refusal(self, x: Tensor, mask: Any, given: dict[str, Any]) -> str:
        """Why this call can't be served, as far as it shows without reading the mask."""
        kind = self.config._attn_implementation
        if kind not in SERVED:
            return f"attn_implementation is {kind!r}, neither 'eager' nor 'sdpa'"
        if self.training and self.attention_dropout:
            return "weights are dropped out"
        if given.get("output_attentions", getattr(self.config, "output_attentions", False)):
            return "weights are to be returned"
        for name in NOT_TAKEN:
            if given.get(name) is not None:
                return f"{name} was given"
        if mask is None and x.shape[1] > 1 and not (kind == "sdpa" and self.is_causal):
            return "later tokens are seen"
        if not _plain(self.kv_b_proj, x):
            return f"kv_b_proj is a {type(self.kv_b_proj).__name__} with ways of its own"
        return ""

    def _differentiates(self, x: Tensor, cache: Any) -> bool:
        """Whether something here requires a gradient: x, what is cached, or a weight."""
        cached = getattr(cache.layers[self.layer_idx], "keys", None)
        weights = self.parameters()  # type: ignore[attr-defined]
        return any(each is not None and each.requires_grad for each in (x, cached, *weights))

    def _serve(self, x: Tensor, positions: Any, mask: Any, cache: Any, past: int) -> Tensor:
        B, T, _ = x.shape
        if past:
            seen = None if mask is None else remembered(windows, mask, B, T, past)
            return self._decode(x, positions, cache, past, seen)
        packed = None if mask is None else remembered(packing, mask, B, T)
        return self._prefill(x, positions, cache, packed)

    def _prefill(self, x: Tensor, positions: Any, cache: Any, packed: Packing | None) -> Tensor:
        """Tokens that see none but each other."""
        B, T, _ = x.shape
        data = self._project(x, positions)
        if cache is not None:
            self._append(cache, *data[2:])
        if packed is None:
            out = mla_attention(*data, *self._up(), softmax_scale=self.scaling)
        else:
            q_nope, q_rope, latent, k_rope = (x.flatten(0, 1)[packed.tokens][None] for x in data)
            found = mla_attention(
                q_nope, q_rope, latent, k_rope, *self._up(),
                softmax_scale=self.scaling, cu_seqlens=packed.cu_seqlens,
            )[0]  # fmt: skip
            padded = found.new_zeros(B * T, *found.shape[1:])
            out = padded.index_copy(0, packed.tokens, found).unflatten(0, (B, T))
        return self.o_proj(out.flatten(2))

    def _decode(
        self, x: Tensor, positions: Any, cache: Any, past: int, seen: Windows | None
    ) -> Tensor:
        """Tokens that also see what is cached."""
        from kexue_kernels.integrations import latent_cache

        B, end = x.shape[0], past + x.shape[1]
        q_nope, q_rope, latent, k_rope = self._project(x, positions)
        held = self._append(cache, latent, k_rope)
        starts = None if seen is None else seen.starts
        pages, table = latent_cache.pages(cache, self.layer_idx, held, end, starts)
        lengths = x.new_full((B,), end, dtype=torch.int32) if seen is None else seen.lengths
        w_uk, w_uv = self._up()
        q_latent = _by_heads(q_nope, w_uk)
        out = mla_decode(
            torch.cat([q_latent, q_rope], -1), pages, table, lengths,
            head_dim_v=self.kv_lora_rank, softmax_scale=self.scaling,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return self.o_proj(_by_heads(out, w_uv.mT).flatten(2))

    def _project(self, x: Tensor, positions: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q_nope [B, T, H, dk], q_rope [B, T, H, dr], kv_latent [B, T, dc], k_rope [B, T, dr]."""
        q = self._queries(x).unflatten(2, (-1, self.qk_head_dim))
        q_nope, q_rope = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split(
            [self.kv_lora_rank, self.qk_rope_head_dim], -1
        )
        q_rope, k_rope = self._rotate(q_rope.transpose(1, 2), k_rope[:, None], positions)
        return q_nope, q_rope.transpose(1, 2), self.kv_a_layernorm(latent), k_rope[:, 0]

    def _queries(self, x: Tensor) -> Tensor:
        """[B, T, H*(dk + dr)]."""
        if self.q_lora_rank is None:  # type: ignore[attr-defined]
            return self.q_proj(x)  # type: ignore[attr-defined]
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))  # type: ignore[attr-defined]

    def _rotate(self, q: Tensor, k: Tensor, positions: Any) -> tuple[Tensor, Tensor]:
        """RoPE of q [B, H, T, dr] and k [B, 1, T, dr], by the original's function."""
        raise NotImplementedError

    def _up(self) -> tuple[Tensor, Tensor]:
        """w_uk [H, dk, dc] and w_uv [H, dv, dc]."""
        sizes = [self.qk_nope_head_dim, self.v_head_dim]
        w_uk, w_uv = self.kv_b_proj.weight.unflatten(0, (-1, sum(sizes))).split(sizes, 1)
        return w_uk, w_uv

    def _append(self, cache: Any, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, 1, L, dc] and keys [B, 1, L, dr] that the cache then holds."""
        if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            from kexue_kernels.integrations import latent_cache

            latent_cache.adopt(cache, self.layer_idx)
        held: tuple[Tensor, Tensor] = cache.update(latent[:, None], k_rope[:, None], self.layer_idx)
        return held


class FusedDeepseekV2(LatentAttention):
    """A DeepSeek-V2 attention that computes with kexue_kernels."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        past_key_values: Any = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, hidden] -> [B, T, hidden], reading and updating the cache."""
        out = self._attend(
            hidden_states, position_embeddings, attention_mask, past_key_values, kwargs
        )
        if out is not None:
            return out, None
        return super().forward(  # type: ignore[misc]
            hidden_states, attention_mask, past_key_values, position_embeddings, **kwargs
        )

    def _rotate(self, q: Tensor, k: Tensor, positions: Any) -> tuple[Tensor, Tensor]:
        q, k = _functions(self).apply_rotary_emb(q, k, positions.to(q.device))
        return q, k


class FusedDeepseekV3(LatentAttention):
    """A DeepSeek-V3 attention that computes with kexue_kernels."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, hidden] -> [B, T, hidden], reading and updating the cache."""
        out = self._attend(
            hidden_states, position_embeddings, attention_mask, past_key_values, kwargs
        )
        if out is not None:
            return out, None
        return super().forward(  # type: ignore[misc]
            hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
        )

    def _rotate(self, q: Tensor, k: Tensor, positions: Any) -> tuple[Tensor, Tensor]:
        functions, (cos, sin) = _functions(self), positions
        if self.config.rope_interleave:
            q, k = functions.apply_rotary_pos_emb_interleave(q, k, cos, sin)
        else:
            q, k = functions.apply_rotary_pos_emb(q, k, cos, sin)
        return q, k


def refusals(attention: Any) -> list[str]:
    """Why this attention can't be replaced."""
    found = []
    if not hasattr(attention, "expand_kv"):
        found.append("this version of Transformers caches expanded keys and values, not latents")
    if type(attention.kv_b_proj) is not nn.Linear:
        found.append(f"its kv_b_proj is a {type(attention.kv_b_proj).__name__}")
    if attention.num_key_value_groups != 1:
        found.append("its heads share keys and values in groups")
    if any(_offloads(part) for part in attention.modules()):
        found.append("Accelerate moves its weights by hooks")
    return found


def _functions(attention: LatentAttention) -> Any:
    """The module of Transformers that defines the original."""
    return sys.modules[attention._original.__module__]


def _by_heads(x: Tensor, w: Tensor) -> Tensor:
    """x [B, T, H, m] times w [H, m, n]: [B, T, H, n]."""
    product = torch.bmm(x.flatten(0, 1).transpose(0, 1), w).transpose(0, 1)
    return product.unflatten(0, x.shape[:2])


def _plain(linear: nn.Module, x: Tensor) -> bool:
    """Whether calling it would be no more than multiplying by its weight."""
    return (
        type(linear) is nn.Linear
        and linear.bias is None
        and linear.weight.device == x.device
        and not (linear._forward_hooks or linear._forward_pre_hooks)
        and (
            "forward" not in vars(linear) or (hasattr(linear, "_hf_hook") and not _offloads(linear))
        )
    )


def _offloads(module: nn.Module) -> bool:
    """Whether Accelerate brings its weights in before each call."""
    return hasattr(module, "_hf_hook") and getattr(module._hf_hook, "offload", True)
