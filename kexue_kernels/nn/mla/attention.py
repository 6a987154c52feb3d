"""Multi-head latent attention as a layer: training, prefill and decoding."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from kexue_kernels import autocast, checks, dispatch
from kexue_kernels.mla import fp8, mla_attention, mla_cache_append, mla_decode
from kexue_kernels.mla.arguments import for_inference
from kexue_kernels.mla.arguments import norm_eps as check_norm_eps
from kexue_kernels.mla.rotary import rotated
from kexue_kernels.nn import arguments
from kexue_kernels.nn.mla import parallel
from kexue_kernels.nn.mla.cache import SelectedSequences
from kexue_kernels.nn.mla.config import options_of
from kexue_kernels.nn.mla.rope import RopeScaling, RotaryAngles
from kexue_kernels.nn.mla.step import DecodeStep, Step, taking

__all__ = ["MultiheadLatentAttention", "expanding_is_cheaper"]

Angles = tuple[Tensor, Tensor]

TILE = 64  # tokens that mla_attention's kernels take at a time


def expanding_is_cheaper(T: int, past: int, *, dk: int, dr: int, dv: int, dc: int) -> bool:
    """Whether T new tokens attend at less cost over expanded keys and values than over latents.

    Expanding the keys and values of T tokens takes as many multiplications as absorbing the
    projections into their queries and results: T dc (dk + dv) a head. What differs are the scores
    and sums: dk + dr + dv for a pair of tokens in whole tiles, against 2 dc + dr for a pair.
    Tokens that are in the cache already (`past`) would have to be expanded again: never.
    """
    tiles = -(-T // TILE)
    expanded = tiles * (tiles + 1) // 2 * TILE**2 * (dk + dr + dv)
    absorbed = T * (T + 1) // 2 * (2 * dc + dr)
    return past == 0 and expanded < absorbed


class MultiheadLatentAttention(nn.Module):
    """DeepSeek-V2's attention: keys and values of all heads from one small latent a token.

        c, r = kv_a_proj_with_mqa(x)                c = kv_a_layernorm(c),  r turned by RoPE
        q = q_b_proj(q_a_layernorm(q_a_proj(x)))    or q_proj(x); its last dr channels turned
        k = [kv_b_proj(c), r],  v = kv_b_proj(c)    never made for all heads at once
        y = o_proj(softmax(q k^T softmax_scale) v)  causal

    Args:
        hidden_size: channels of the input and of the output.
        num_heads: H.
        q_lora_rank: width of the queries' latent; None: queries straight from x, by `q_proj`.
        kv_lora_rank: dc, width of the latent of keys and values.
        qk_nope_head_dim: dk, channels of a head's query and key that carry no position.
        qk_rope_head_dim: dr, those that do, the key's shared by all heads; 0 for none.
        v_head_dim: dv, channels of a head's value.
        rope_theta: RoPE's base; None turns nothing (NoPE).
        rope_interleaved: RoPE turns channels 2i and 2i + 1 together, as DeepSeek's checkpoints
            want; else i and i + dr/2.
        rope_scaling: a checkpoint's dict, for contexts longer than the one trained on: "rope_type"
            (or "type") is "default", "linear", "ntk", "dynamic" or "yarn". See
            `kexue_kernels.nn.mla.RotaryAngles`.
        softmax_scale: what scores are multiplied by; if None (dk + dr)**-0.5, times YaRN's
            (0.1 mscale_all_dim ln(factor) + 1)**2 where that is in use.
        norm_eps: added to the mean square by both RMSNorms.
        bias: whether `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj` have one (`attention_bias` of
            checkpoints).
        process_group: ranks that share out the heads, evenly; see below.
        device, dtype: of the parameters; float32, bfloat16, float16 or float64 (None: PyTorch's
            defaults).
        backend: "auto", "reference", "cpu", "triton" or "cuda", for all that the layer calls.

    Parameters, named and shaped as in DeepSeek-V2's and V3's checkpoints: `q_a_proj` [q_lora_rank,
    hidden_size], `q_a_layernorm` [q_lora_rank], `q_b_proj` [H (dk + dr), q_lora_rank] (or `q_proj`
    [H (dk + dr), hidden_size]), `kv_a_proj_with_mqa` [dc + dr, hidden_size], `kv_a_layernorm` [dc],
    `kv_b_proj` [H (dk + dv), dc], `o_proj` [hidden_size, H dv].

    **Tensor parallel.** With a process group each rank holds `q_b_proj` (`q_proj`), `kv_b_proj` and
    `o_proj` of its heads and all of the other parameters, sees the same x and gives the same y.
    One sum over the ranks follows `o_proj`, one the gradients of the latents, so that gradients of
    x and of what all ranks hold are whole on each. `shard(state_dict, rank, world)` cuts a full
    state. Ranks seeded alike start as the unsharded layer does with that seed.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a size, range, shape, dtype or device that doesn't fit, named.
        BackendUnavailableError: a forced backend that can't serve the call.

    Source: DeepSeek-AI, "DeepSeek-V2" (2024), section 2.1 and appendix C; sharding as in Shoeybi et
    al., "Megatron-LM" (2019), section 3.
    """

    shard = staticmethod(parallel.shard)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        rope_theta: float | None = 10000.0,
        rope_interleaved: bool = True,
        rope_scaling: Mapping[str, object] | None = None,
        softmax_scale: float | None = None,
        norm_eps: float = 1e-6,
        bias: bool = False,
        process_group: distributed.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, value, smallest in (
            ("hidden_size", hidden_size, 1),
            ("num_heads", num_heads, 1),
            ("kv_lora_rank", kv_lora_rank, 1),
            ("qk_nope_head_dim", qk_nope_head_dim, 1),
            ("qk_rope_head_dim", qk_rope_head_dim, 0),
            ("v_head_dim", v_head_dim, 1),
        ):
            arguments.size(name, value, smallest)
        if q_lora_rank is not None:
            arguments.size("q_lora_rank", q_lora_rank)
        checks.boolean("rope_interleaved", rope_interleaved)
        checks.boolean("bias", bias)
        check_norm_eps(norm_eps)
        arguments.parameter_dtype(dtype)
        rank, world = parallel.ranks(process_group, num_heads)
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.q_lora_rank, self.kv_lora_rank = q_lora_rank, kv_lora_rank
        self.qk_nope_head_dim, self.qk_rope_head_dim = qk_nope_head_dim, qk_rope_head_dim
        self.v_head_dim, self.rope_interleaved = v_head_dim, rope_interleaved
        self.process_group = process_group if world > 1 else None
        self.local_heads = num_heads // world
        self.norm_eps, self.backend = float(norm_eps), dispatch.check_name(backend)

        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.rope = None
        if rope_theta is not None and qk_rope_head_dim:
            self.rope = RotaryAngles(qk_rope_head_dim, rope_theta, rope_scaling, device=device)
        elif RopeScaling.of(rope_scaling).rope_type != "default":
            raise ValueError(f"rope_scaling: expected None where nothing turns, got {rope_scaling}")
        self.softmax_scale = self._scale(softmax_scale)
        qk = num_heads * (qk_nope_head_dim + qk_rope_head_dim)
        if q_lora_rank is None:
            self.q_proj = nn.Linear(hidden_size, qk, bias=False, **where)
        else:
            self.q_a_proj = nn.Linear(hidden_size, q_lora_rank, bias=bias, **where)
            self.q_a_layernorm = nn.RMSNorm(q_lora_rank, norm_eps, **where)
            self.q_b_proj = nn.Linear(q_lora_rank, qk, bias=False, **where)
        self.kv_a_proj_with_mqa = nn.Linear(
            hidden_size, kv_lora_rank + qk_rope_head_dim, bias=bias, **where
        )
        self.kv_a_layernorm = nn.RMSNorm(kv_lora_rank, norm_eps, **where)
        kv = num_heads * (qk_nope_head_dim + v_head_dim)
        self.kv_b_proj = nn.Linear(kv_lora_rank, kv, bias=False, **where)
        self.o_proj = nn.Linear(num_heads * v_head_dim, hidden_size, bias=bias, **where)
        if world > 1:
            parallel.keep_own_heads(self, rank, world)

    @classmethod
    def from_config(cls, config: Any, **options: Any) -> Self:
        """The layer of a Transformers DeepseekV2Config or DeepseekV3Config, weights drawn anew.

        `options` go to the constructor beside what `config` says. The state of Transformers'
        `DeepseekV2Attention` or `DeepseekV3Attention` loads into it.
        """
        return cls(**{**options_of(config), **options})

    def _scale(self, given: float | None) -> float:
        if given is None:
            stretch = 1.0 if self.rope is None else self.rope.scaling.score_scale
            return stretch * (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        arguments.finite("softmax_scale", given)
        return float(given)

    def forward(
        self,
        x: Tensor,
        cache: SelectedSequences | DecodeStep | None = None,
        position_ids: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """y [B, T, hidden_size] for x [B, T, hidden_size], in x's dtype.

        Args:
            x: in the module's dtype; under autocast float32, bfloat16 or float16.
            cache: `PagedLatentCache.select(seq_ids)` of B sequences, or a
                `kexue_kernels.nn.mla.DecodeStep` of them: the tokens are appended to these, and see
                what they held. For inference: raises in grad mode where anything requires grad.
                Under torch.compile the former breaks the graph once, the latter doesn't.
            position_ids: int32 or int64 [T] or [B, T], what RoPE turns by; 0 to T - 1, or on from
                what the cache holds, if None. Which tokens a token sees doesn't depend on it.
            cu_seqlens: boundaries of sequences packed along T in a batch of 1, as in
                `kexue_kernels.mla_attention`; not with a cache.

        Into an empty cache many tokens attend over expanded keys and values; else W_uk and W_uv of
        `kv_b_proj` are absorbed into queries and results, and the latents are attended to as
        they are cached.

        Raises CacheFullError, and changes nothing, where the cache has too few free pages.
        """
        arguments.data(x, self.hidden_size, "[B, T, hidden_size]", self.o_proj.weight)
        _check_positions(position_ids, x)
        if cache is None:
            y = self._whole(x, position_ids, cu_seqlens)
        else:
            self._check_cache(cache, x)
            if cu_seqlens is not None:
                raise ValueError("cu_seqlens: expected None with a cache")
            if isinstance(cache, DecodeStep):  # lengths are unknown on the host: expands nothing
                step, expand = cache.tensors, False
            else:
                past, step = taking()(cache, x.shape[1], self.backend)
                expand = expanding_is_cheaper(x.shape[1], past, **self._head_sizes())
            y = self._cached(x, step, expand, position_ids)
        return y.to(x.dtype)

    def _whole(self, x: Tensor, position_ids: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        if position_ids is None:
            position_ids = _positions(x, cu_seqlens)
        angles = self._angles(position_ids)
        q, latent, key = self._down(x)
        latent, key = _normed(latent, self.kv_a_layernorm), self._turned(key, angles)
        if self.process_group is not None:
            q, latent, key = parallel.copied(self.process_group, q, latent, key)
        return self._output(self._expanded(*self._queries(q, angles), latent, key, cu_seqlens))

    def _cached(self, x: Tensor, step: Step, expand: bool, position_ids: Tensor | None) -> Tensor:
        B, T, _ = x.shape
        if position_ids is None:
            position_ids = step.cache_seqlens[:, None] + torch.arange(-T, 0, device=x.device)
        angles = self._angles(position_ids.expand(B, T))
        q, latent, key = self._down(x)
        q_nope, q_rope = self._queries(q, angles)
        self._append(step, latent, key, angles)
        if not expand:
            return self._output(self._absorbed(q_nope, q_rope, step))
        latent, key = _normed(latent, self.kv_a_layernorm), self._turned(key, angles)
        return self._output(self._expanded(q_nope, q_rope, latent, key))

    def _down(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the queries come from, and latents [B, T, dc] and keys [B, T, dr] still raw."""
        q = x if self.q_lora_rank is None else _normed(self.q_a_proj(x), self.q_a_layernorm)
        sizes = [self.kv_lora_rank, self.qk_rope_head_dim]
        latent, key = self.kv_a_proj_with_mqa(x).split(sizes, -1)
        return q, latent, key

    def _queries(self, q: Tensor, angles: Angles | None) -> tuple[Tensor, Tensor]:
        """q_nope [B, T, H, dk] and q_rope [B, T, H, dr]."""
        q = self.q_proj(q) if self.q_lora_rank is None else self.q_b_proj(q)
        sizes = [self.qk_nope_head_dim, self.qk_rope_head_dim]
        q_nope, q_rope = q.unflatten(-1, (self.local_heads, sum(sizes))).split(sizes, -1)
        if angles is not None:
            angles = angles[0].unsqueeze(-2), angles[1].unsqueeze(-2)  # for each head
        return q_nope, self._turned(q_rope, angles)

    def up_projections(self) -> tuple[Tensor, Tensor]:
        """w_uk [H, dk, dc] and w_uv [H, dv, dc]: views of `kv_b_proj`'s weight."""
        sizes = [self.qk_nope_head_dim, self.v_head_dim]
        weight = self.kv_b_proj.weight.view(self.local_heads, sum(sizes), self.kv_lora_rank)
        w_uk, w_uv = weight.split(sizes, 1)
        return w_uk, w_uv

    def _expanded(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        key: Tensor,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        return mla_attention(
            q_nope, q_rope, latent, key, *self.up_projections(),
            softmax_scale=self.softmax_scale, cu_seqlens=cu_seqlens, backend=self.backend,
        )  # fmt: skip

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, step: Step) -> Tensor:
        w_uk, w_uv = self.up_projections()
        q = torch.einsum("bthk,hkc->bthc", q_nope, w_uk)
        out = mla_decode(
            torch.cat([q, q_rope], -1), step.kv_cache, step.block_table, step.cache_seqlens,
            head_dim_v=self.kv_lora_rank, softmax_scale=self.softmax_scale, backend=self.backend,
        )  # fmt: skip
        return torch.einsum("bthc,hvc->bthv", out, w_uv)

    def _append(self, step: Step, latent: Tensor, key: Tensor, angles: Angles | None) -> None:
        """Raw latents [B, T, dc] and keys [B, T, dr], normalised and turned on their way."""
        dtype = fp8.dtype_of(step.kv_cache)  # under autocast it may differ
        latent, key = latent.to(dtype), key.to(dtype)
        cos, sin = (None, None) if angles is None else (part.flatten(0, 1) for part in angles)
        mla_cache_append(
            latent.flatten(0, 1), key.flatten(0, 1), step.kv_cache, step.slots,
            norm_weight=self.kv_a_layernorm.weight, norm_eps=self.norm_eps,
            cos=cos, sin=sin, rope_interleaved=self.rope_interleaved, backend=self.backend,
        )  # fmt: skip

    def _output(self, out: Tensor) -> Tensor:
        """y [B, T, hidden_size] of the heads' results [B, T, H, dv]."""
        out, o_proj = out.flatten(2), self.o_proj
        if self.process_group is None:
            return o_proj(out)
        y = parallel.summed(self.process_group, F.linear(out, o_proj.weight))
        return y if o_proj.bias is None else y + o_proj.bias

    def _angles(self, position_ids: Tensor) -> Angles | None:
        return None if self.rope is None else self.rope(position_ids)

    def _turned(self, x: Tensor, angles: Angles | None) -> Tensor:
        if angles is None:
            return x
        dtype = checks.state_dtype(x.dtype)
        cos, sin = (part.to(dtype) for part in angles)
        return rotated(x.to(dtype), cos, sin, self.rope_interleaved).to(x.dtype)

    def _head_sizes(self) -> dict[str, int]:
        dk, dr = self.qk_nope_head_dim, self.qk_rope_head_dim
        return {"dk": dk, "dr": dr, "dv": self.v_head_dim, "dc": self.kv_lora_rank}

    def _check_cache(self, given: object, x: Tensor) -> None:
        if not isinstance(given, SelectedSequences | DecodeStep):
            raise TypeError(
                "cache: expected PagedLatentCache.select(seq_ids) or a DecodeStep, "
                f"got {type(given).__name__}"
            )
        sequences = given.sequences if isinstance(given, DecodeStep) else given
        cache, B = sequences.cache, len(sequences.seq_ids)
        for name in ("kv_lora_rank", "qk_rope_head_dim"):
            if getattr(cache, name) != getattr(self, name):
                raise ValueError(
                    f"cache: expected {name} = {getattr(self, name)}, got {getattr(cache, name)}"
                )
        checks.device("cache", cache.kv_cache, x.device, "x")
        own, held = self.o_proj.weight.dtype, fp8.dtype_of(cache.kv_cache)
        if held != own and not autocast.enabled(x.device.type):
            raise ValueError(f"cache: expected one for {own}, got one for {held}")
        if x.shape[0] != B:
            raise ValueError(
                f"x: expected a row for each of the cache's {B} sequences, got {list(x.shape)}"
            )
        if isinstance(given, DecodeStep) and given.tokens != x.shape[1]:
            raise ValueError(
                f"x: expected the {given.tokens} tokens of the DecodeStep, got {list(x.shape)}"
            )
        for_inference("MultiheadLatentAttention with a cache", x, *self.parameters())

    def extra_repr(self) -> str:
        """The sizes of a head, and what else is not the default."""
        sizes = ", ".join(f"{name}={value}" for name, value in self._head_sizes().items())
        shared = f", {self.local_heads} here" if self.process_group is not None else ""
        forced = "" if self.backend == "auto" else f", backend={self.backend!r}"
        return f"{self.num_heads} heads{shared}, {sizes}{forced}"


def _normed(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """In x's dtype, which under autocast isn't the weight's."""
    return F.rms_norm(x, norm.weight.shape, norm.weight.to(x.dtype), norm.eps)


def _positions(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """int64 [T], from 0 in each sequence."""
    positions = torch.arange(x.shape[1], device=x.device)
    if cu_seqlens is None:
        return positions
    checks.cu_seqlens(cu_seqlens, x, "x")
    bounds = cu_seqlens.long()
    return positions - bounds[torch.searchsorted(bounds, positions, right=True) - 1]


def _check_positions(position_ids: Tensor | None, x: Tensor) -> None:
    if position_ids is None:
        return
    B, T, _ = x.shape
    checks.tensor("position_ids", position_ids)
    checks.dtype("position_ids", position_ids, checks.INDEX)
    checks.device("position_ids", position_ids, x.device, "x")
    *rows, tokens = position_ids.shape or (0,)
    if position_ids.ndim not in (1, 2) or tokens != T or any(n not in (1, B) for n in rows):
        raise ValueError(
            f"position_ids: expected shape [T] = {[T]} or [B, T] = {[B, T]}, "
            f"got {list(position_ids.shape)}"
        )
