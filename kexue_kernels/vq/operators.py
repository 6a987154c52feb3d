"""The registered operators of the vq family, and the gradient of vector_quantize.

Launcher modules `<backend>_<op>`, given non-empty plain tensors (contiguous unless said):

    nearest_codebook: search(x [H, N, d] any strides, codebook [H, K, d] any strides, metric,
        precision) -> int64 [H, N]
    vector_quantize: forward(x [N, d], codebook [K, d], indices [N]) -> (quantized [N, d], the
        mean square float32); backward(grad_quantized [N, d] any strides, x, codebook, indices,
        gradient, scale_x, scale_c) -> (grad_x [N, d], grad_codebook [K, d]), the scales being
        the gradients of the two losses, float32 scalars. Without a scale_c nobody wants
        grad_codebook, which may then be anything.
    codebook_statistics: statistics(x [N, d], indices [N], num_codes) -> (counts, sums)

Indices are int64.
"""

from typing import Any

import torch
from torch import Tensor

from kexue_kernels import registry
from kexue_kernels.checks import state_dtype
from kexue_kernels.dispatch import resolve
from kexue_kernels.launchers import launcher_of, served_by_reference
from kexue_kernels.vq import arguments, reference


def _search_fake(x: Tensor, codebook: Tensor, metric: str, precision: str, backend: str) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


@registry.operator(
    "nearest_codebook(Tensor x, Tensor codebook, str metric, str precision, str backend) -> Tensor",
    fake=_search_fake,
)
def nearest_codebook(
    x: Tensor, codebook: Tensor, metric: str, precision: str, backend: str
) -> Tensor:
    """int64 [H, N] of x [H, N, d] and codebook [H, K, d]."""
    if served_by_reference("nearest_codebook", x, resolve(backend)):
        return reference.nearest_codebook(x, codebook, metric=metric, precision=precision)
    launcher = launcher_of("vq", "nearest_codebook", backend, x)
    if x.numel() == 0 or codebook.numel() == 0:  # codes of no channels are all equal
        return torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
    return launcher.search(plain(x), plain(codebook), metric, precision)


def _quantize_fake(
    x: Tensor, codebook: Tensor, indices: Tensor, gradient: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    losses = (x.new_empty((), dtype=state_dtype(x.dtype)) for _ in range(2))
    return (x.new_empty(x.shape), *losses)  # type: ignore[return-value]


def _setup_quantize(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, gradient, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.gradient, ctx.backend = gradient, backend


def _grad_quantize(
    ctx: Any, grad: Tensor | None, grad_commitment: Tensor | None, grad_codebook: Tensor | None
) -> tuple[Any, ...]:
    x, codebook, indices = ctx.saved_tensors
    needs_x, needs_codebook, *_ = ctx.needs_input_grad
    if grad is None and grad_commitment is None:
        needs_x = False
    needs_codebook = needs_codebook and grad_codebook is not None
    if not needs_x and not needs_codebook:
        return (None,) * 5
    if grad is None:
        grad = x.new_zeros(()).expand(x.shape)
    if grad_commitment is None:
        grad_commitment = x.new_zeros((), dtype=state_dtype(x.dtype))
    scale_c = grad_codebook if needs_codebook else None
    grads = vector_quantize_backward(
        grad, x, codebook, indices, grad_commitment, scale_c, ctx.gradient, ctx.backend
    )
    return grads[0] if needs_x else None, grads[1] if needs_codebook else None, None, None, None


@registry.operator(
    "vector_quantize(Tensor x, Tensor codebook, Tensor indices, str gradient, str backend) "
    "-> (Tensor quantized, Tensor commitment_loss, Tensor codebook_loss)",
    fake=_quantize_fake,
    setup_context=_setup_quantize,
    backward=_grad_quantize,
)
def vector_quantize(
    x: Tensor, codebook: Tensor, indices: Tensor, gradient: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """codebook[indices] [N, d], and the mean square of what that changed, twice."""
    launcher = launcher_of("vq", "vector_quantize", backend, x)
    if x.numel() == 0:
        loss = x.new_zeros((), dtype=state_dtype(x.dtype))
        return torch.empty_like(x), loss, loss.clone()
    indices = plain(indices).contiguous()
    quantized, loss = launcher.forward(plain(x).contiguous(), plain(codebook).contiguous(), indices)
    return quantized, loss, loss.clone()


def _backward_fake(
    grad_quantized: Tensor,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    scale_x: Tensor,
    scale_c: Tensor | None,
    gradient: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = codebook.shape if scale_c is not None else (0,)
    return x.new_empty(x.shape), codebook.new_empty(shape)


@registry.operator(
    "vector_quantize_backward(Tensor grad_quantized, Tensor x, Tensor codebook, Tensor indices, "
    "Tensor scale_x, Tensor? scale_c, str gradient, str backend) "
    "-> (Tensor grad_x, Tensor grad_codebook)",
    fake=_backward_fake,
    setup_context=registry.keep_nothing,
    backward=registry.refuse_gradient("the gradient of vector_quantize"),
)
def vector_quantize_backward(
    grad_quantized: Tensor,
    x: Tensor,
    codebook: Tensor,
    indices: Tensor,
    scale_x: Tensor,
    scale_c: Tensor | None,
    gradient: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """grad_x [N, d] and, given a scale_c, grad_codebook [K, d]: else it is empty."""
    launcher = launcher_of("vq", "vector_quantize", backend, x)
    if x.numel() == 0:
        grad_codebook = torch.zeros_like(codebook) if scale_c is not None else codebook.new_empty(0)
        return torch.empty_like(x), grad_codebook
    grad_x, grad_codebook = launcher.backward(
        plain(grad_quantized),
        plain(x).contiguous(),
        plain(codebook).contiguous(),
        plain(indices).contiguous(),
        gradient,
        plain(scale_x).float(),
        None if scale_c is None else plain(scale_c).float(),
    )
    return grad_x, grad_codebook if scale_c is not None else codebook.new_empty(0)


def _statistics_fake(
    x: Tensor, indices: Tensor, num_codes: int, backend: str
) -> tuple[Tensor, Tensor]:
    counts = x.new_empty(num_codes, dtype=torch.int64)
    return counts, x.new_empty((num_codes, x.shape[1]), dtype=state_dtype(x.dtype))


@registry.operator(
    "codebook_statistics(Tensor x, Tensor indices, SymInt num_codes, str backend) "
    "-> (Tensor counts, Tensor sums)",
    fake=_statistics_fake,
)
def codebook_statistics(
    x: Tensor, indices: Tensor, num_codes: int, backend: str
) -> tuple[Tensor, Tensor]:
    """counts int64 [K] and sums float32 [K, d] of x [N, d] by indices [N]."""
    if served_by_reference("codebook_statistics", x, resolve(backend)):
        return reference.codebook_statistics(x, indices, num_codes)
    arguments.indices_in_range(indices, num_codes)
    launcher = launcher_of("vq", "codebook_statistics", backend, x)
    if indices.numel() == 0 or x.shape[1] == 0:
        kept = indices[(indices >= 0) & (indices < num_codes)]
        sums = _statistics_fake(x, indices, num_codes, backend)[1]
        return torch.bincount(kept, minlength=num_codes), sums.zero_()
    indices = plain(indices).long().contiguous()
    return launcher.statistics(plain(x).contiguous(), indices, num_codes)


def plain(x: Tensor) -> Tensor:
    """Without lazy negation, which a pointer does not show."""
    return x.resolve_neg() if x.is_neg() else x
