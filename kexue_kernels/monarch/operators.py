"""The registered operators of the monarch family, their gradients and batching rules.

Write M(x, w, ...) for a product, linear in each argument, and g for the gradient that arrives.
The backward operator's own gradient needs no new formula: with u, v, ... those of dx, dw, ..., it
is the gradient of Re <g, M(u, w, ...) + M(x, v, ...) + ...>: more products and their gradients,
and so on to any order.

Launcher modules `<backend>_<op>`, given non-empty plain tensors of any strides, return contiguous
ones in their dtype:

    monarch_matmul: forward(x [N, k*p], w1 [k, q, p], w2 [l, s, r], bias [s*l] | None) -> [N, s*l]
        backward(grad [N, s*l], x, w1, w2, wanted) -> (dx | None, dw1 | None, dw2 | None)
    block_diag_matmul: forward(x [N, k*p], w [k, q, p], bias [k*q] | None) -> [N, k*q]
        backward(grad [N, k*q], x, w, wanted) -> (dx | None, dw | None)

`wanted` has a bool for each result. Where only dx is, x is of its shape and holds anything.
"""

from typing import Any

from torch import Tensor

from kexue_kernels import registry
from kexue_kernels.launchers import launcher_of

Dims = tuple[int | None, ...]
Grads = tuple[Tensor | None, ...]


class Product:
    """The two operators of a product of rows x [N, in] with one factor after the other.

    forward: (x, *factors, bias | None, backend) -> y [N, out]
    backward: (grad [N, out], x | None, *factors, *wanted, backend) -> a gradient for x and each
        factor, empty where not wanted. x is needed for the factors' alone.
    """

    def __init__(self, name: str, *factors: str) -> None:
        self.name = name
        self.linear = 1 + len(factors)  # x and the factors
        inputs = ", ".join(f"Tensor {factor}" for factor in factors)
        wanted = ", ".join(f"bool want_{each}" for each in ("x", *factors))
        grads = ", ".join(f"Tensor grad_{each}" for each in ("x", *factors))
        self.forward = registry.operator(
            f"{name}(Tensor x, {inputs}, Tensor? bias, str backend) -> Tensor",
            fake=self._fake,
            setup_context=self._setup,
            backward=self._gradient,
            vmap=self._vmap,
        )(self._forward)
        self.backward = registry.operator(
            f"{name}_backward(Tensor grad, Tensor? x, {inputs}, {wanted}, str backend)"
            f" -> ({grads})",
            fake=self._backward_fake,
            setup_context=self._backward_setup,
            backward=self._backward_gradient,
            vmap=self._backward_vmap,
        )(self._backward)

    # ---- forward

    def _forward(self, x: Tensor, *args: Any) -> Tensor:
        *factors, bias, backend = args
        launcher = launcher_of("monarch", self.name, backend, x)
        bias = None if bias is None else plain(bias)
        if not all(map(Tensor.numel, (x, *factors))):  # nothing to add up
            y = x.new_zeros(x.shape[0], _out_features(factors))
            return y if bias is None else y.copy_(bias)
        return launcher.forward(plain(x), *map(plain, factors), bias)

    def _fake(self, x: Tensor, *args: Any) -> Tensor:
        *factors, _, _ = args
        return x.new_empty(x.shape[0], _out_features(factors))

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002
        x, *factors, _, backend = inputs
        ctx.set_materialize_grads(False)
        needs_x = any(ctx.needs_input_grad[1 : self.linear])
        ctx.save_for_backward(x if needs_x else None, *factors)
        ctx.backend = backend

    def _gradient(self, ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * (self.linear + 2)
        *wanted, wants_bias, _ = ctx.needs_input_grad
        grads = self._wanted_grads(grad, ctx.saved_tensors, wanted, ctx.backend)
        return *grads, grad.sum(0) if wants_bias else None, None

    def _wanted_grads(self, grad: Tensor, inputs: Any, wanted: list[bool], backend: str) -> Grads:
        """The backward operator's, None where nothing was wanted."""
        if not any(wanted):
            return (None,) * self.linear
        found = self.backward(grad, *inputs, *wanted, backend)
        return tuple(part if want else None for part, want in zip(found, wanted, strict=True))

    def _vmap(self, info: Any, in_dims: Dims, *args: Any) -> tuple[Any, Any]:
        """Mapped rows are more rows; a mapped factor or bias means a call each."""
        x_dim, *other_dims = in_dims
        if x_dim is None or any(dim is not None for dim in other_dims):
            return registry.one_by_one(self.forward.overload)(info, in_dims, *args)
        x, *others = args
        rows = x.movedim(x_dim, 0)
        y = self.forward.overload(rows.flatten(0, 1), *others)
        return y.unflatten(0, rows.shape[:2]), 0

    # ---- backward

    def _backward(self, grad: Tensor, x: Tensor | None, *args: Any) -> Grads:
        factors, wanted, backend = self._split(args)
        launcher = launcher_of("monarch", self.name, backend, grad)
        if x is None:  # what stands for it is never read
            x = grad.new_empty(()).expand(grad.shape[0], _in_features(factors))
        inputs = [plain(t) for t in (x, *factors)]
        if not all(map(Tensor.numel, (grad, *inputs))):
            pairs = zip(inputs, wanted, strict=True)
            return tuple(t.new_zeros(t.shape) if want else None for t, want in pairs)
        return launcher.backward(plain(grad), *inputs, wanted)

    def _backward_fake(self, grad: Tensor, _: Tensor | None, *args: Any) -> Grads:
        factors, wanted = self._split(args)[:2]
        shapes = [(grad.shape[0], _in_features(factors)), *(w.shape for w in factors)]
        return tuple(
            grad.new_empty(shape) if want else registry.nothing(grad)
            for shape, want in zip(shapes, wanted, strict=True)
        )

    def _backward_setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002
        grad, x, *rest = inputs
        factors, ctx.wanted, ctx.backend = self._split(tuple(rest))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad, x, *factors)

    def _backward_gradient(self, ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        """See the head of this file: each cotangent takes the place of its own argument."""
        grad, *inputs = ctx.saved_tensors
        needs_grad, *needs = ctx.needs_input_grad[: 1 + self.linear]
        grad_grad: Tensor | None = None
        grads: Grads = (None,) * self.linear
        for place, cotangent in enumerate(cotangents):
            if cotangent is None or not ctx.wanted[place]:
                continue
            term = [*inputs[:place], cotangent, *inputs[place + 1 :]]
            if needs_grad:
                grad_grad = _sum(grad_grad, self.forward(*term, None, ctx.backend))
            wanted = [need and at != place for at, need in enumerate(needs)]
            parts = self._wanted_grads(grad, term, wanted, ctx.backend)
            grads = tuple(map(_sum, grads, parts))
        return grad_grad, *grads, *(None,) * (self.linear + 1)

    def _backward_vmap(self, info: Any, in_dims: Dims, *args: Any) -> tuple[Any, Any]:
        """Gradients of mapped rows are more rows; factors get one from each call."""
        grad, _, *rest = args
        factors, wanted, backend = self._split(tuple(rest))
        grad_dim, _, *other_dims = in_dims
        if grad_dim is None or any(wanted[1:]) or any(dim is not None for dim in other_dims):
            return registry.one_by_one(self.backward.overload)(info, in_dims, *args)
        rows = grad.movedim(grad_dim, 0)
        dx, *others = self.backward.overload(rows.flatten(0, 1), None, *factors, *wanted, backend)
        return (dx.unflatten(0, rows.shape[:2]), *others), (0, *(None,) * len(others))

    def _split(self, args: tuple[Any, ...]) -> tuple[list[Tensor], tuple[bool, ...], str]:
        """(factors, wanted, backend) of what follows grad and x in the backward's arguments."""
        count = self.linear - 1
        return list(args[:count]), tuple(args[count:-1]), args[-1]


def plain(x: Tensor) -> Tensor:
    """Without lazy conjugation or negation, which a pointer does not show."""
    return x.resolve_conj().resolve_neg() if x.is_conj() or x.is_neg() else x


def _in_features(factors: list[Tensor]) -> int:
    k, _, p = factors[0].shape
    return k * p


def _out_features(factors: list[Tensor]) -> int:
    blocks, each, _ = factors[-1].shape
    return blocks * each


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


_monarch = Product("monarch_matmul", "w1", "w2")
monarch_matmul, monarch_matmul_backward = _monarch.forward, _monarch.backward

_block_diag = Product("block_diag_matmul", "w")
block_diag_matmul, block_diag_matmul_backward = _block_diag.forward, _block_diag.backward
