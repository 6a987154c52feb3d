"""Who searches a codebook, and who trains one: this package, plain PyTorch, other packages.

A peer's own preparation is not timed: faiss's copy of the codes, the squares that the k-means
packages carry along. What they give is int32 or int64 [N], NumPy's or PyTorch's.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kexue_kernels as kk
from kexue_kernels.benchmarks.case import Contestant, Function, Inputs, as_given
from kexue_kernels.nn.vq.converters import to_vector_quantize_pytorch

CDIST = "torch cdist + argmin"
PRODUCT = "torch product + argmin"
FAISS = "faiss IndexFlatL2"
FLASH_KMEANS = "flash-kmeans"
FASTKMEANS = "fastkmeans"
THEIRS = "vector-quantize-pytorch"
PACKAGE = "vector_quantize_pytorch"

DECAY = 0.8  # of running means, where a codebook is trained
ELEMENTS = 2**26  # of a product of rows and codes at once
MATRIX_BYTES = {"cpu": 4 * 2**30, "cuda": 32 * 2**30}  # the largest N x K of float32 to try
Shape = tuple[int, int, int]  # N, K, d
Arguments = tuple[Any, ...]


def ours(backend: str, precision: str) -> Contestant:
    def search(x: Tensor, codebook: Tensor) -> Tensor:
        return kk.nearest_codebook(x, codebook, precision=precision, backend=backend)

    return Contestant(
        f"kexue {backend} {precision}",
        lambda: search,
        ours=True,
        unfit=absent(backend),
        approximate=precision == "fast",
    )


def absent(backend: str) -> str:
    """Why one of our backends can't run here; empty where it can."""
    status = kk.backends()[backend]
    return "" if status.available else status.reason


def cdist(shape: Shape, device: torch.device) -> Contestant:
    """What most people write; halves through float32, which is all that it takes."""
    return peer(CDIST, lambda: _cdist, unfit=too_large(shape, device))


def product() -> Contestant:
    """|c|^2 / 2 - x.c in float32 (TF32 off), by blocks of rows."""
    return peer(PRODUCT, lambda: _product)


def faiss(dtype: torch.dtype) -> Contestant:
    def prepare(inputs: Inputs) -> Arguments:
        package, codebook = importlib.import_module("faiss"), inputs["codebook"]
        package.omp_set_num_threads(torch.get_num_threads())
        index = package.IndexFlatL2(codebook.shape[1])
        index.add(codebook.numpy())
        return index, inputs["x"]

    def search(index: Any, x: Tensor) -> Tensor:
        _, found = index.search(x.numpy(), 1)
        return torch.from_numpy(found[:, 0])

    unfit = "" if dtype == torch.float32 else "takes float32"
    return peer(FAISS, lambda: search, package="faiss", unfit=unfit, prepare=prepare)


def flash_kmeans(shape: Shape, device: torch.device) -> Contestant:
    """Its assignment step: Triton on GPU, its blocked PyTorch on CPU."""
    on_gpu = device.type == "cuda"

    def load() -> Function:
        name = "assign_euclid_triton" if on_gpu else "torch_fallback"
        module = importlib.import_module(f"flash_kmeans.{name}")
        native = "euclid_assign_triton" if on_gpu else "euclid_assign_torch_native_chunked"
        assign = getattr(module, native)
        return lambda x, codebook, squares: assign(x, codebook, squares)[0]

    def prepare(inputs: Inputs) -> Arguments:
        x, codebook = inputs["x"][None], inputs["codebook"][None]
        return x, codebook, x.float().square().sum(-1)

    rows = min(shape[0], 32768)  # of its blocks, which have all codes
    unfit = "" if on_gpu else too_large((rows, *shape[1:]), device)
    return peer(FLASH_KMEANS, load, package="flash_kmeans", unfit=unfit, prepare=prepare)


def fastkmeans(dtype: torch.dtype, device: torch.device) -> Contestant:
    """Its Triton kernel on GPU, which multiplies in float16; `predict` on CPU."""
    if device.type == "cuda":
        return peer(FASTKMEANS, _load_fastkmeans, package="fastkmeans", prepare=_with_squares)

    def load() -> Function:
        return _predict

    unfit = "" if dtype == torch.float32 else "takes NumPy's float32"
    return peer(FASTKMEANS, load, package="fastkmeans", unfit=unfit)


def vector_quantize_pytorch(shape: Shape, device: torch.device) -> Contestant:
    """Its module in evaluation: the search, and the codes gathered, which it always does."""

    def prepare(inputs: Inputs) -> Arguments:
        return theirs(inputs["codebook"].float()).eval(), inputs["x"][None]

    @torch.no_grad()
    def search(module: Any, x: Tensor) -> Tensor:
        indices: Tensor = module(x)[1][0]
        return indices

    unfit = too_large(shape, device)
    return peer(THEIRS, lambda: search, package=PACKAGE, unfit=unfit, prepare=prepare, slow=True)


def own(codebook: Tensor, backend: str = "auto") -> kk.nn.VectorQuantizer:
    """A quantiser with running means and these codes, each of which was counted once so far."""
    K, d = codebook.shape
    module = kk.nn.VectorQuantizer(
        d,
        K,
        ema_decay=DECAY,
        commitment_weight=1.0,
        device=codebook.device,
        dtype=codebook.dtype,
        backend=backend,
    )
    module.codes.copy_(codebook)
    module.embed_sum.copy_(codebook)
    return module


def theirs(codebook: Tensor) -> Any:
    """The same of vector-quantize-pytorch."""
    VectorQuantize = importlib.import_module(PACKAGE).VectorQuantize
    K, d = codebook.shape
    module = VectorQuantize(dim=d, codebook_size=K, decay=DECAY, rotation_trick=False)
    module.load_state_dict(to_vector_quantize_pytorch(own(codebook)))
    return module.to(codebook.device)


def too_large(shape: Shape, device: torch.device) -> str:
    """Why a matrix of rows by codes is not made here; empty where it is."""
    matrix = 4 * shape[0] * shape[1]
    if matrix <= MATRIX_BYTES[device.type]:
        return ""
    return f"its matrix of rows by codes takes {matrix / 1e9:.1f} GB, several times over"


def peer(
    name: str,
    load: Callable[[], Function],
    package: str = "",
    unfit: str = "",
    prepare: Callable[[Inputs], Arguments] = as_given,
    slow: bool = False,
) -> Contestant:
    return Contestant(
        name, load, package=package, unfit=unfit, slow=slow, approximate=True, prepare=prepare
    )


def _cdist(x: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(x.float(), codebook.float()).argmin(1)


def _product(x: Tensor, codebook: Tensor) -> Tensor:
    codes = codebook.float()
    half = codes.square().sum(1) / 2
    parts = x.float().split(max(1, ELEMENTS // codes.shape[0]))
    return torch.cat([torch.addmm(half, rows, codes.mT, alpha=-1).argmin(1) for rows in parts])


def _predict(x: Tensor, codebook: Tensor) -> Tensor:
    model = importlib.import_module("fastkmeans").FastKMeans(
        codebook.shape[1], codebook.shape[0], gpu=False, use_triton=False
    )
    model.centroids = codebook.numpy()
    return torch.from_numpy(model.predict(x.numpy()))


def _load_fastkmeans() -> Function:
    kernel = importlib.import_module("fastkmeans.triton_kernels").triton_kmeans

    def assign(x: Tensor, x_squares: Tensor, codebook: Tensor, squares: Tensor) -> Tensor:
        found = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        kernel(x, x_squares, codebook, squares, found)
        return found

    return assign


def _with_squares(inputs: Inputs) -> Arguments:
    x, codebook = inputs["x"], inputs["codebook"]
    return x, x.float().square().sum(1), codebook, codebook.float().square().sum(1)
