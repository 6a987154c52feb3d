"""monarch_matmul's product on Hopper GPUs in CUDA C++: one kernel, z exchanged within clusters.

The kernels: csrc/monarch/monarch_matmul_*.cuh. They serve the product alone; its gradients are the
Triton backend's, so that a backward pass needs Triton too. Nothing here waits for the device, so
calls can be captured in a graph. "auto" leaves it alone until a GPU has passed its tests
(launchers.OFF_BY_DEFAULT).
"""

import torch
from torch import Tensor

from kexue_kernels import dispatch
from kexue_kernels.cuda_common import current_stream as _stream
from kexue_kernels.cuda_common import module as _module
from kexue_kernels.cuda_common import refused_by_device, rows_aligned
from kexue_kernels.monarch.plan import Shape, cluster

DTYPES = {torch.bfloat16: 1, torch.float16: 2}
MOST_ROWS = 2**31 - 1


def forward(x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor | None) -> Tensor:
    """x [N, k*p], w1 [k, q, p], w2 [l, s, r], bias [s*l] -> [N, s*l]."""
    size = cluster_size(x, w1, w2)
    if refused := reasons(x, w1, w2):
        raise _unavailable(refused)
    (k, q, p), (l, s, r) = w1.shape, w2.shape
    rows = _rows(x)
    first, second = _whole(w1), _whole(w2)
    shift = None if bias is None else _whole(bias)
    y = x.new_empty(x.shape[0], s * l)
    with _stream(x.device) as stream:
        _module().monarch_matmul_cuda(
            sizes=(x.shape[0], k, q, p, l, s, r),
            cluster=size,
            dtype=DTYPES[x.dtype],
            x=(rows.data_ptr(), rows.stride(0)),
            w1=first.data_ptr(),
            w2=second.data_ptr(),
            bias=0 if shift is None else shift.data_ptr(),
            y=y.data_ptr(),
            stream=stream,
        )
    return y


def backward(
    grad: Tensor, x: Tensor, w1: Tensor, w2: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The Triton backend's, whatever the shape."""
    triton = dispatch.backends()["triton"]
    if not triton.available:
        raise _unavailable([f"its gradients are the triton backend's ({triton.reason})"])
    from kexue_kernels.monarch import triton_monarch_matmul  # Triton may not be there

    return triton_monarch_matmul.backward(grad, x, w1, w2, wanted)


def reasons(x: Tensor, w1: Tensor, w2: Tensor) -> list[str]:
    """Why the kernels can't serve this product, beyond what the backend's status says."""
    serves = "the Hopper path serves"
    found = []
    if x.dtype not in DTYPES:
        found.append(f"{serves} bfloat16 and float16, got {x.dtype}")
    elif cluster_size(x, w1, w2) is None:
        (k, q, p), (l, s, r) = w1.shape, w2.shape
        found.append(
            f"{serves} factors that a cluster of up to 16 thread blocks shares, l dividing q (see "
            f"kexue_kernels/monarch/plan.py), got {k=}, {q=}, {p=}, {l=}, {s=}, {r=}"
        )
    if x.shape[0] > MOST_ROWS:
        found.append(f"{serves} fewer than 2**31 rows, got {x.shape[0]}")
    return found + refused_by_device(x.device)


def cluster_size(x: Tensor, w1: Tensor, w2: Tensor) -> int | None:
    """The thread blocks that share the factors and z, or None where no number of them serves."""
    (k, q, p), (l, s, r) = w1.shape, w2.shape
    found = cluster(Shape(x.shape[0], k, q, p, l, s, r, x.dtype))
    return None if found is None else found.size


def _rows(x: Tensor) -> Tensor:
    """x as it is, where its rows are aligned and don't overlap, or a copy."""
    if rows_aligned(x, x.stride()[:1]) and x.stride(0) >= x.shape[1]:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _whole(x: Tensor) -> Tensor:
    """x as it is, where it is contiguous and aligned, or a copy."""
    if x.is_contiguous() and rows_aligned(x, ()):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _unavailable(refused: list[str]) -> dispatch.BackendUnavailableError:
    return dispatch.BackendUnavailableError(
        f"monarch_matmul: backend 'cuda' can't serve this call: {'; '.join(refused)}"
    )
