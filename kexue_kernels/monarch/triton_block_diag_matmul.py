"""block_diag_matmul on GPUs with Triton."""

from torch import Tensor

from kexue_kernels.monarch.triton_monarch_products import gradients, product, weights_gradient


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
    g, rows = grad.unflatten(1, (k, q)), x.unflatten(1, (k, p))
    if not want_x:
        return None, weights_gradient(g, rows) if want_w else None
    dx = grad.new_empty(grad.shape[0], k * p)
    if want_w:
        return dx, gradients(g, w, rows, dx.unflatten(1, (k, p)))
    product(g, w.mT, None, dx.unflatten(1, (k, p)), conjugate=True)
    return dx, None
