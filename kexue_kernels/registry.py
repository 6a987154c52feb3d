"""One helper that registers an operator with torch.library: schema, kernel, fake, gradient, vmap.

Registered this way an operator is opaque to torch.compile and costs a few microseconds a
call; `Operator` keeps it that cheap when nothing has to be recorded for autograd.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

NAMESPACE = "kexue_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")

Function = Callable[..., Any]

_modes = torch._C._len_torch_dispatch_stack  # each look-up would cost as much as the call
_tracing_state = torch._C._get_tracing_state
_includes = torch._C._dispatch_tls_is_dispatch_key_included
_BATCHED_GRADS: Any = torch._C._parse_dispatch_key("VmapMode")

# Not the subclasses of Tensor, such as fake ones, which dispatch in their own way.
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str))


def operator(
    schema: str,
    *,
    fake: Function,
    backward: Function | None = None,
    setup_context: Function | None = None,
    vmap: Function | None = None,
) -> Callable[[Function], "Operator"]:
    """Decorate the implementation of `schema` ("name(Tensor x, ...) -> ..."), for all devices.

    `fake` allocates the outputs as the implementation does, without computing them; the
    others are torch.library's; without `vmap`, the mapped calls are made one by one. The
    decorated function becomes the new `Operator`. Where nobody asked for an output the
    implementation may give None: the schema's tensor is then an empty one, `nothing(...)`.
    """
    name = schema[: schema.index("(")]
    qualified = f"{NAMESPACE}::{name}"

    def decorate(implementation: Function) -> Operator:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
        _library.impl(name, _without_none(implementation), "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, fake, lib=_library)
        if backward is not None:
            torch.library.register_autograd(
                qualified, backward, setup_context=setup_context, lib=_library
            )
        overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        torch.library.register_vmap(qualified, vmap or one_by_one(overload), lib=_library)

        transformed = _transformable(overload, setup_context, backward)
        return Operator(overload, transformed, implementation)

    return decorate


class Operator:
    """Calls a registered operator by the shortest way that autograd and torch.func allow."""

    def __init__(self, overload: Function, transformed: Function, implementation: Function) -> None:
        self.overload = overload  # what a batching rule calls: torch.func has taken its turn
        self.transformed = transformed
        self.implementation = implementation

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.overload(*args)
        if _is_transformed():
            return self.transformed(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return self.overload(*args)
        if _is_watched() or not _PLAIN.issuperset(map(type, args)):
            return self.overload(*args)
        if args[0].is_meta:  # served by the fake
            return self.overload(*args)
        return self.implementation(*args)  # nobody watches: spares some 20 us of dispatch


def nothing(x: torch.Tensor) -> torch.Tensor:
    """What stands for an output that nobody asked for; `x` is the operator's first argument."""
    return x.new_empty(0)


def _without_none(implementation: Function) -> Function:
    @functools.wraps(implementation)
    def complete(*args: Any) -> Any:
        result = implementation(*args)
        if not isinstance(result, tuple):
            return result
        return tuple(nothing(args[0]) if part is None else part for part in result)

    return complete


def refuse_vmap(reason: str) -> Function:
    """A batching rule for an operator that has none."""

    def rule(*_: Any) -> Any:
        raise RuntimeError(f"torch.vmap can't map over this: {reason}")

    return rule


def keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """The setup_context of an operator whose gradient is refused."""


def refuse_gradient(what: str) -> Function:
    """The backward of an operator that has none: no gradient is silently dropped."""

    def backward(*_: Any) -> Any:
        raise RuntimeError(f"{what} can't be differentiated; backend='reference' can")

    return backward


def one_by_one(overload: Function) -> Function:
    """A batching rule: one call for each index of the mapped axes, all results stacked."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        def of(index: int) -> Any:
            return overload(
                *(
                    arg if dim is None else arg.select(dim, index)
                    for arg, dim in zip(args, in_dims, strict=True)
                )
            )

        if info.batch_size == 0:
            return _of_none(overload, in_dims, args)
        results = [of(index) for index in range(info.batch_size)]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


def _of_none(overload: Function, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> Any:
    """No calls' results: of one call's shapes."""
    one = (
        arg if dim is None else arg.new_zeros(arg.movedim(dim, 0).shape[1:])
        for arg, dim in zip(args, in_dims, strict=True)
    )
    found = overload(*one)
    if isinstance(found, torch.Tensor):
        return found.new_empty(0, *found.shape), 0
    return tuple(x.new_empty(0, *x.shape) for x in found), (0,) * len(found)


def _is_watched() -> bool:
    """Whether a dispatch mode, torch.jit.trace or the vmap of `is_grads_batched` is active."""
    return _modes() > 0 or _tracing_state() is not None or _includes(_BATCHED_GRADS)


def _is_transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is active."""
    if forward_ad._current_level >= 0:
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None


def _transformable(
    overload: Function, setup: Function | None, backward_formula: Function | None
) -> Function:
    """`overload` for torch.func: its transforms refuse the Function that torch.library makes."""
    if setup is None or backward_formula is None:
        return overload

    members = {
        "generate_vmap_rule": True,
        "forward": staticmethod(overload),
        "setup_context": staticmethod(setup),
        "backward": staticmethod(backward_formula),
    }
    return getattr(type("Transformed", (torch.autograd.Function,), members), "apply")  # noqa: B009
