"""RoPE's angles, and their scaling for contexts longer than the one trained on."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor, nn

from kexue_kernels import checks
from kexue_kernels.nn import arguments

NEEDED = {
    "default": (),
    "linear": ("factor",),
    "ntk": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class RopeScaling:
    """What a checkpoint's `rope_scaling` (or `rope_parameters`) says."""

    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 1
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    @classmethod
    def of(cls, given: Mapping[str, object] | None) -> "RopeScaling":
        """Checked; None is no scaling, and older checkpoints say "type" for "rope_type"."""
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(f"rope_scaling: expected a dict, got {type(given).__name__}")
        options = dict(given or {})
        kind = options.pop("type", "default")
        kind = options.setdefault("rope_type", kind)
        arguments.one_of("rope_scaling['rope_type']", kind, tuple(NEEDED))
        known = {field.name for field in fields(cls)}
        for name, value in options.items():
            if name not in known:
                raise ValueError(
                    f"rope_scaling: expected only {', '.join(sorted(known))}, got {name!r}"
                )
            _check(name, value)
        for name in NEEDED[str(kind)]:
            if options.get(name) is None:
                raise ValueError(f"rope_scaling: expected {name!r} for {kind!r}, got none")
        return cls(**{k: v for k, v in options.items() if v is not None})  # type: ignore[arg-type]

    @property
    def score_scale(self) -> float:
        """What YaRN multiplies the softmax's scale by, as in DeepSeek-V2."""
        if self.rope_type != "yarn" or not self.mscale_all_dim:
            return 1.0
        return self._mscale(self.mscale_all_dim) ** 2

    @property
    def amplitude(self) -> float:
        """What YaRN multiplies cos and sin by."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    def _mscale(self, weight: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1


def frequencies(dim: int, theta: float | Tensor, scaling: RopeScaling) -> Tensor:
    """Radians a token of each pair of channels, float32 [dim/2] ([.., dim/2] for theta [.., 1]).

    Rounded as in DeepSeek's code: a checkpoint gets the angles it was trained with.
    """
    kind, factor = scaling.rope_type, scaling.factor
    device = theta.device if isinstance(theta, Tensor) else "cpu"
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    if kind == "ntk":
        theta = theta * factor ** (dim / (dim - 2))
    wavelengths = theta**exponents  # tokens a radian
    if kind == "linear":
        return 1 / wavelengths / factor
    if kind != "yarn":
        return 1 / wavelengths
    assert isinstance(theta, float)
    kept = 1 - _ramp(dim, theta, scaling)
    return 1 / (factor * wavelengths) * (1 - kept) + 1 / wavelengths * kept


def _ramp(dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """YaRN's interpolation: 0 for pairs that turn beta_fast times in the trained context, 1 for
    those that turn less than beta_slow times."""

    def pair(turns: float) -> float:
        ratio = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    pairs = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
    return ((pairs - low) / width).clamp(0, 1)


class RotaryAngles(nn.Module):
    """cos and sin of every token's angles.

    Args:
        dim: dr, an even number of channels that are turned pair by pair.
        theta: the base; pair i turns theta**(-2 i / dim) radians a token.
        scaling: a dict, or None:
            "linear": positions divided by `factor`.
            "ntk": theta * factor**(dim / (dim - 2)).
            "dynamic": the same with factor L / original_max_position_embeddings - (factor - 1) for
                factor, L each sequence's length, once that is the longer.
            "yarn": `factor`, `original_max_position_embeddings`, `beta_fast`, `beta_slow`,
                `mscale`, `mscale_all_dim`, `attention_factor`, `truncate`.
        device: of the frequencies, which stay float32 whatever a model is cast to.

    Source: Su et al., "RoFormer" (2021), equation 15; Chen et al., "Extending Context Window of
    Large Language Models via Positional Interpolation" (2023); Peng et al., "YaRN" (2023),
    equations 13 to 15 and appendix A.2; DeepSeek-AI, "DeepSeek-V2" (2024), section 3.1.4.
    """

    frequencies: Tensor

    def __init__(
        self,
        dim: int,
        theta: float = 10000.0,
        scaling: Mapping[str, object] | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        arguments.size("qk_rope_head_dim", dim)
        if dim % 2:
            raise ValueError(f"qk_rope_head_dim: expected an even number to turn, got {dim}")
        arguments.number("rope_theta", theta)
        if not 1 < theta < math.inf:
            raise ValueError(f"rope_theta: expected a number above 1, got {theta}")
        self.dim, self.theta, self.scaling = dim, float(theta), RopeScaling.of(scaling)
        if dim == 2 and self.scaling.rope_type in ("ntk", "dynamic"):
            kind = self.scaling.rope_type
            raise ValueError(f"qk_rope_head_dim: expected at least 4 to scale by {kind!r}, got 2")
        own = frequencies(dim, self.theta, self.scaling).to(device or torch.get_default_device())
        self.register_buffer("frequencies", own, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [.., T, dr/2], of integer positions [.., T]."""
        angles = positions[..., None].float() * self._frequencies(positions)
        amplitude = self.scaling.amplitude
        return angles.cos() * amplitude, angles.sin() * amplitude

    def _frequencies(self, positions: Tensor) -> Tensor:
        if self.frequencies.is_meta and not positions.is_meta:  # a state was assigned to the layer
            own = frequencies(self.dim, self.theta, self.scaling)
            self.frequencies = own.to(positions.device)
        if self.scaling.rope_type != "dynamic" or positions.shape[-1] == 0:
            return self.frequencies
        original, factor = self.scaling.original_max_position_embeddings, self.scaling.factor
        lengths = (positions.amax(-1, keepdim=True) + 1).clamp(min=original)[..., None]
        stretch = factor * lengths / original - (factor - 1)
        theta = self.theta * stretch ** (self.dim / (self.dim - 2))  # [.., 1, 1]
        return frequencies(self.dim, theta, self.scaling)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """A cast leaves the frequencies alone, and `to_empty` finds them."""
        super()._apply(fn, recurse)
        own = frequencies(self.dim, self.theta, self.scaling)
        self.frequencies = own.to(self.frequencies.device)
        return self

    def extra_repr(self) -> str:
        kind = self.scaling.rope_type
        scaled = "" if kind == "default" else f", {kind}, factor={self.scaling.factor}"
        return f"{self.dim}, theta={self.theta}{scaled}"


def _check(name: str, value: object) -> None:
    label = f"rope_scaling[{name!r}]"
    if value is None or name == "rope_type":
        return
    if name == "truncate":
        checks.boolean(label, value)
        return
    arguments.finite(label, value)
    if name == "factor" and value < 1:  # type: ignore[operator]
        raise ValueError(f"{label}: expected a number from 1 on, got {value}")
    if name in POSITIVE and value <= 0:  # type: ignore[operator]
        raise ValueError(f"{label}: expected a positive number, got {value}")


POSITIVE = ("original_max_position_embeddings", "beta_fast", "beta_slow")
