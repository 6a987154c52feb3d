"""One helper that registers an operator with torch.library: schema, kernel, fake, gradient, vmap.

Registered this way an operator is opaque to torch.compile and costs a few microseconds a
call; `call` keeps it that cheap when nothing has to be recorded for autograd.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

NAMESPACE = "kexue_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")

Function = Callable[..., Any]


def operator(
    schema: str,
    *,
    fake: Function,
    backward: Function | None = None,
    setup_context: Function | None = None,
    vmap: Function | None = None,
) -> Callable[[Function], Function]:
    """Decorate the implementation of `schema` ("name(Tensor x, ...) -> ..."), for all devices.

    `fake` allocates the outputs as the implementation does, without computing them; the
    others are torch.library's. The decorated function becomes `call` of the new operator.
    """
    name = schema[: schema.index("(")]
    qualified = f"{NAMESPACE}::{name}"

    def decorate(implementation: Function) -> Function:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
        _library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, fake, lib=_library)
        if backward is not None:
            torch.library.register_autograd(
                qualified, backward, setup_context=setup_context, lib=_library
            )
        if vmap is not None:
            torch.library.register_vmap(qualified, vmap, lib=_library)
        overload = getattr(getattr(torch.ops, NAMESPACE), name).default

        transformed = _transformable(overload, setup_context, backward)

        def call(*args: Any) -> Any:
            if torch.compiler.is_compiling():
                return overload(*args)
            if torch._C._functorch.peek_interpreter_stack() is not None:
                return transformed(*args)
            if _may_be_recorded(args):
                return overload(*args)
            with torch._C._AutoDispatchBelowAutograd():  # spares 14 us of Python autograd
                return overload(*args)

        call.__name__ = name
        return call

    return decorate


def _may_be_recorded(args: tuple[Any, ...]) -> bool:
    """Whether autograd or forward-mode AD may watch this call."""
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
        return True
    return forward_ad._current_level >= 0


def _transformable(
    overload: Function, setup: Function | None, backward_formula: Function | None
) -> Function:
    """`overload` for torch.func: its transforms refuse the Function that torch.library makes."""
    if setup is None or backward_formula is None:
        return overload

    class Transformed(torch.autograd.Function):
        generate_vmap_rule = True
        forward = staticmethod(overload)
        setup_context = staticmethod(setup)
        backward = staticmethod(backward_formula)

    return Transformed.apply
