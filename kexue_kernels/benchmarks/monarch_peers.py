"""Who multiplies by a Monarch matrix: this package's backends, plain PyTorch, torch-structured.

The dense layer has the same matrix multiplied out, which is not timed: its width is what counts.
The gradient of that matrix goes on to the factors, as what is checked, not timed either.
"""

import importlib
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import kexue_kernels as kk
from kexue_kernels.benchmarks.case import Contestant, Function, Inputs

DENSE = "torch linear, dense"
BMM = "torch bmm twice"
COMPILED = "torch.compile of the reference"
STRUCTURED = "torch-structured"
REFERENCE = "torch einsum"

MOST_DENSE = {"cpu": 2**28, "cuda": 2**32}  # bytes of a dense matrix to try
Pair = tuple[Tensor, Tensor]


def ours(backend: str) -> Contestant:
    status = kk.backends()[backend]
    unfit = "" if status.available else status.reason
    return Contestant(
        f"kexue {backend}",
        lambda: partial(kk.monarch_matmul, backend=backend),
        ours=True,
        unfit=unfit,
    )


def reference() -> Contestant:
    """The definition, in any precision."""
    return Contestant(REFERENCE, lambda: kk.reference.monarch_matmul)


def compiled() -> Contestant:
    return Contestant(COMPILED, lambda: torch.compile(kk.reference.monarch_matmul), slow=True)


def bmm() -> Contestant:
    """As fly's layers do it: a batched product for each factor, with copies for the layouts."""
    return Contestant(BMM, lambda: bmm_twice)


def structured() -> Contestant:
    """Its `blockdiag_butterfly_multiply`, plain PyTorch with a gradient of its own."""

    def load() -> Function:
        with warnings.catch_warnings():  # of kernels that it can't build, for other functions
            warnings.simplefilter("ignore")
            module = importlib.import_module(
                "torch_structured.monarch.blockdiag_butterfly_multiply"
            )
        multiply: Function = module.blockdiag_butterfly_multiply
        return multiply

    return Contestant(STRUCTURED, load, package="torch_structured")


def dense(matrix_bytes: int, device: torch.device) -> Contestant:
    """`approximate`: its matrix is rounded once more than the factors are."""

    def prepare(inputs: Inputs) -> Pair:
        return inputs["x"], matrix(inputs["w1"], inputs["w2"])

    def chain(gradients: tuple[Tensor, ...], inputs: Inputs) -> tuple[Tensor, ...]:
        grad_x, grad_matrix = gradients
        factors = [inputs[name].detach().requires_grad_() for name in ("w1", "w2")]
        return grad_x, *torch.autograd.grad(matrix(*factors), factors, grad_matrix)

    unfit = too_large(matrix_bytes, device)
    return Contestant(
        DENSE,
        lambda: torch.nn.functional.linear,
        unfit=unfit,
        approximate=True,
        prepare=prepare,
        chain=chain,
    )


def matrix(w1: Tensor, w2: Tensor) -> Tensor:
    return kk.monarch_to_dense(w1, w2).contiguous()


def too_large(matrix_bytes: int, device: torch.device) -> str:
    """Why a dense matrix is not made here; empty where it is."""
    if matrix_bytes <= MOST_DENSE[device.type]:
        return ""
    return f"its matrix takes {matrix_bytes / 1e9:.1f} GB, several times over"


def bmm_twice(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """x [N, k*p], w1 [k, q, p], w2 [l, s, r] -> [N, s*l]."""
    (k, _, p), (l, s, r) = w1.shape, w2.shape
    blocks = x.view(-1, k, p).transpose(0, 1).contiguous()  # k N p
    z = torch.bmm(blocks, w1.mT).transpose(0, 1).reshape(-1, r, l)
    y = torch.bmm(z.permute(2, 0, 1).contiguous(), w2.mT)  # l N s
    return y.permute(1, 2, 0).reshape(-1, s * l)


On = Callable[[int, torch.device], list[Contestant]]  # from the bytes of the dense matrix


def on_cpu(matrix_bytes: int, device: torch.device) -> list[Contestant]:
    return [ours("cpu"), *others(matrix_bytes, device)]


def on_gpu(matrix_bytes: int, device: torch.device) -> list[Contestant]:
    return [ours("triton"), *others(matrix_bytes, device)]


def others(matrix_bytes: int, device: torch.device) -> list[Contestant]:
    return [structured(), bmm(), dense(matrix_bytes, device), compiled()]
