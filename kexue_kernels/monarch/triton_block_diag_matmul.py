"""block_diag_matmul on GPUs with Triton."""

from torch import Tensor

from kexue_kernels.monarch.triton_monarch_products import product, weights_gradient


def forward(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    k, q, p = w.shape
    y = x.new_empty(x.shape[0], k * q)
    bias = None if bias is None else bias.unflatten(0, (k, q))
    product(x.unflatten(1, (k, p)), w, bias, y.unflatten(1, (k, q)))
    return y


def backward(
    grad: Tensor, x: Tensor, w: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    k, q, p = w.shape
    want_x, want_w = wanted
    g = grad.unflatten(1, (k, q))
    dx = grad.new_empty(grad.shape[0], k * p) if want_x else None
    if dx is not None:
        product(g, w.mT, None, dx.unflatten(1, (k, p)), conjugate=True)
    return dx, weights_gradient(g, x.unflatten(1, (k, p))) if want_w else None
