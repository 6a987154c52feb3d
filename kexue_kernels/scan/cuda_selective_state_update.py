"""selective_state_update in CUDA C++: a thin call (csrc/scan/selective_state_update_cuda.cu)."""

from torch import Tensor

from kexue_kernels.scan.cuda_linear_scan import DTYPES, _address, _module, _stream


def update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state_batch_indices: Tensor | None,
    out: Tensor,
) -> None:
    with _stream(x.device) as stream:
        _module().selective_state_update_cuda(
            sizes=(*x.shape, A.shape[2], B.shape[1], state.shape[0]),
            dtype=DTYPES[x.dtype],
            state_dtype=DTYPES[state.dtype],
            softplus=dt_softplus,
            state=_array(state, 4),
            x=_array(x, 3),
            dt=_array(dt, 3),
            A=_array(A, 3),
            B=_array(B, 3),
            C=_array(C, 3),
            D=_array(D, 2),
            z=_array(z, 3),
            bias=_array(dt_bias, 2),
            indices=_address(state_batch_indices),
            out=out.data_ptr(),
            stream=stream,
        )


def _array(x: Tensor | None, ndim: int) -> tuple[int, ...]:
    """Address and strides."""
    return (0,) * (1 + ndim) if x is None else (x.data_ptr(), *x.stride())
