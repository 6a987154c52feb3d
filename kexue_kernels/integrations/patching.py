"""Replace modules by instance: the same object and weights, of a subclass with its own forward."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from kexue_kernels.integrations import deepseek, mamba
from kexue_kernels.integrations.report import PatchReport


class Handler(NamedTuple):
    """How modules of one class are replaced."""

    mixin: type  # holds the forward, put before the original class
    refusals: Callable[[nn.Module], list[str]]  # why this very module can't be


# By the original class's full name, so that nothing of Transformers is imported.
HANDLERS = {
    "transformers.models.deepseek_v2.modeling_deepseek_v2.DeepseekV2Attention": Handler(
        deepseek.FusedDeepseekV2, deepseek.refusals
    ),
    "transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3Attention": Handler(
        deepseek.FusedDeepseekV3, deepseek.refusals
    ),
    "transformers.models.mamba.modeling_mamba.MambaMixer": Handler(
        mamba.FusedMamba, mamba.refusals
    ),
    "transformers.models.falcon_mamba.modeling_falcon_mamba.FalconMambaMixer": Handler(
        mamba.FusedFalconMamba, mamba.refusals
    ),
}


def patch(model: nn.Module) -> PatchReport:
    """Replace, in place, the modules of a Transformers model that these ops serve.

    Each stays the same object with the same parameters and state_dict keys; training, cached
    generation and padded batches give the same results within dtype tolerance. Mixers of Mamba
    and FalconMamba compute with `selective_scan` and `selective_state_update`; unlike the
    originals, a call with several tokens goes on from the cache's state. Attention of DeepSeek-V2
    and V3 computes with `mla_attention` and `mla_decode`, from the latents that are cached; a call
    that they can't serve is left to the original's code, with the reason logged once.

    Args:
        model: any module; those of its submodules that can be replaced are.

    Returns:
        `.replaced`, a list of (module path, original class name), and `.skipped`, a list of
        (module path, reason) for modules of these kinds that were left as they are.

    Raises:
        TypeError: `model` is not a module.
        ImportError: Transformers is not installed.
    """
    _check(model)
    report = PatchReport([], [])
    for path, module in model.named_modules():
        original, handler = _handler(type(module))
        if handler is None:
            continue
        reasons = _refusals(module, original, handler)
        if reasons:
            report.skipped.append((path, "; ".join(reasons)))
        else:
            report.replaced.append((path, original.__name__))
            module.__class__ = _fused(original, handler.mixin)
    return report


def unpatch(model: nn.Module) -> None:
    """Restore what `patch` replaced in `model`.

    Raises:
        TypeError: `model` is not a module.
        ImportError: Transformers is not installed.
    """
    _check(model)
    for module in model.modules():
        if isinstance(module, Replaced):
            module.__class__ = module._original


class Replaced:
    """What every replaced module also is."""

    _original: type

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copies and pickles stay replaced: their class is made anew, from the original."""
        return _rebuilt, (self._original,), self.__dict__


def _rebuilt(original: type) -> Any:
    _, handler = _handler(original)
    assert handler is not None
    return object.__new__(_fused(original, handler.mixin))


@functools.cache
def _fused(original: type, mixin: type) -> type:
    """A subclass of the same name, as device maps go by the names of classes."""
    members = {"_original": original, "__module__": original.__module__, "__doc__": mixin.__doc__}
    return type(original.__name__, (mixin, Replaced, original), members)


def _handler(cls: type) -> tuple[type, Handler | None]:
    """The class that is served among `cls` and its bases, and how."""
    for base in cls.__mro__:
        handler = HANDLERS.get(f"{base.__module__}.{base.__qualname__}")
        if handler is not None and not issubclass(base, Replaced):
            return base, handler
    return cls, None


def _refusals(module: nn.Module, original: type, handler: Handler) -> list[str]:
    if isinstance(module, Replaced):
        return ["already patched"]
    if type(module) is not original:
        return [f"{type(module).__qualname__} is a subclass of {original.__name__}"]
    if "forward" in module.__dict__:
        return ["its forward was replaced on the instance"]
    return handler.refusals(module)


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("patching needs Hugging Face Transformers: pip install transformers")
