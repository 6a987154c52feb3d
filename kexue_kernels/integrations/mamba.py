"""Mamba and FalconMamba mixers of Transformers, computed with the selective scan.

Transformers' caches hold, for each layer, the convolution's last K inputs [B, d, K] and the
scan's state [B, d, n]. Since version 5 they are asked by methods, and know whether they hold
anything; before, they were lists of zeros, and `cache_position` told a first call from a step.
"""

from typing import Any

import torch
from torch import Tensor, nn

from kexue_kernels import dispatch
from kexue_kernels.nn.scan.mixing import (
    Constants,
    Normalise,
    RMSNormalise,
    constants,
    mix,
    mix_step,
)

Cached = tuple[Tensor | None, Tensor | None]  # convolution inputs and state, or nothing yet


class FusedMamba:
    """A Mamba mixer that computes with kexue_kernels."""

    layer_idx: int
    conv_kernel_size: int
    _original: type

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any = None,
        *,
        cache_position: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B, L, hidden] -> [B, L, hidden], reading and updating the cache."""
        reason = self._refusal(cache_params, kwargs)
        if reason:
            if not torch.compiler.is_compiling():
                kind = self._original.__name__
                dispatch.note_once(f"{kind}: left to Transformers' own code: {reason}")
            given = {"cache_params": cache_params, "attention_mask": attention_mask}
            if cache_position is not None:
                given["cache_position"] = cache_position
            return super().forward(hidden_states, **given, **kwargs)  # type: ignore[misc]
        x, mask, normalise = hidden_states, attention_mask, self._normaliser()
        if cache_params is None:
            return mix(self, x, mask=mask, normalise=normalise)[0].to(x.dtype)
        inputs, state = _load(cache_params, self.layer_idx, cache_position)
        if inputs is None or state is None:
            window = x.new_zeros(x.shape[0], self.conv_kernel_size, self._inner())
        elif x.shape[1] == 1 and mask is None and not torch.is_grad_enabled():
            prepared = _prepared(self, cache_params)
            y = mix_step(self, x, inputs.mT, state, prepared=prepared, normalise=normalise)
            return y.to(x.dtype)
        else:
            window, state = inputs.mT, state.clone()  # the cache is written to before a backward
        y, window, state = mix(self, x, window, state, mask=mask, normalise=normalise)
        _store(cache_params, self.layer_idx, window.mT, state)
        return y.to(x.dtype)

    def _refusal(self, cache: Any, given: dict[str, Any]) -> str:
        """Why this call is the original's."""
        if given:
            return f"{', '.join(given)} was given"
        return "the cache keeps its past" if _records(cache, self.layer_idx) else ""

    def _normaliser(self) -> Normalise | None:
        return None

    def _inner(self) -> int:
        return self.D.shape[0]  # type: ignore[attr-defined]


class FusedFalconMamba(FusedMamba):
    """A FalconMamba mixer that computes with kexue_kernels: dt, B and C are RMS-normalised."""

    rms_eps: float

    def _normaliser(self) -> Normalise:
        return RMSNormalise(self.rms_eps)


def refusals(mixer: nn.Module) -> list[str]:
    """Why this mixer can't be replaced."""
    found = []
    if type(mixer.conv1d) is not nn.Conv1d:
        found.append(f"its conv1d is a {type(mixer.conv1d).__name__}")
    if any(hasattr(part, "_hf_hook") for part in mixer.modules()):
        found.append("Accelerate moves its weights by hooks")
    return found


def _records(cache: Any, layer: int) -> bool:
    """Whether the cache keeps all inputs to roll back, which the original sees to."""
    recording = getattr(cache, "is_recording_past", None)
    return recording is not None and recording(layer)


def _load(cache: Any, layer: int, position: Tensor | None) -> Cached:
    if hasattr(cache, "get_recurrent_state"):
        return cache.get_conv_state(layer, 0), cache.get_recurrent_state(layer, 0)
    if position is None or position.shape[0] != 1:
        return None, None
    return cache.conv_states[layer], cache.ssm_states[layer]


def _store(cache: Any, layer: int, inputs: Tensor, state: Tensor) -> None:
    if hasattr(cache, "get_recurrent_state"):
        cache.update_conv_state(inputs, layer)
        cache.update_recurrent_state(state, layer)
    else:
        cache.conv_states[layer].copy_(inputs)
        cache.ssm_states[layer].copy_(state)


def _prepared(mixer: Any, cache: Any) -> Constants | None:
    """The mixer's constants, kept beside its states for as long as its parameters stay."""
    conv = mixer.conv1d
    used = conv.weight, conv.bias, mixer.A_log, mixer.D, mixer.dt_proj.bias
    if torch.compiler.is_compiling() or any(p is not None and p.is_inference() for p in used):
        return None  # there are no versions to go by
    version = [p if p is None else (p.data_ptr(), p._version) for p in used]
    kept = vars(cache).setdefault("_kexue_kernels", {})
    if kept.get(mixer.layer_idx, (None, None))[0] != version:
        kept[mixer.layer_idx] = version, constants(mixer)
    return kept[mixer.layer_idx][1]
