"""codebook_statistics and ema_update_: a codebook that follows the mean of its rows.

Launcher modules `<backend>_ema_update` offer the update's step, as `reference.ema_step_` has it:
step(codebook, cluster_size, embed_sum, counts, sums, decay, eps), the first three in place.
"""

import math
from types import ModuleType

import torch
from torch import Tensor

from kexue_kernels import checks, dispatch, launchers, registry
from kexue_kernels.vq import arguments, blocked_ema_update, operators, reference


def codebook_statistics(
    x: Tensor, indices: Tensor, num_codes: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """How many rows each code has, and the sum of those rows.

    Args:
        x: rows [..., d]; float32, bfloat16 or float16 (float64 is served by the reference).
        indices: the code of each row, int32 or int64 [...]; -1 is ignored. Any other value
            outside 0 .. num_codes - 1 raises on CPU and is ignored on GPU.
        num_codes: K >= 1.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        counts int64 [K], and sums float32 [K, d] (float64 in float64), added up in an order
        that depends on the inputs alone: the same inputs give bitwise the same sums. Inputs
        are taken detached.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a wrong shape, dtype, device or value, named.
        BackendUnavailableError: a forced backend that can't serve the call.

    Source: van den Oord et al., "Neural Discrete Representation Learning" (2017), appendix A.1.
    """
    arguments.indices_of(x, indices)
    arguments.integer("num_codes", num_codes, smallest=1)
    backend = dispatch.resolve(backend)
    rows = x.detach().reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return operators.codebook_statistics(rows, indices.reshape(-1), num_codes, backend)


@torch.no_grad()
def ema_update_(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_sum: Tensor,
    x: Tensor,
    indices: Tensor,
    *,
    decay: float,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Move a codebook, in place, towards the running mean of the rows that chose each code.

        cluster_size = decay cluster_size + (1 - decay) counts
        embed_sum = decay embed_sum + (1 - decay) sums
        smoothed = (cluster_size + eps) / (n + K eps) n,    n = sum of cluster_size
        codebook = embed_sum / smoothed

    This is vector-quantize-pytorch's update. A code whose smoothed size is 0 (no row was ever
    counted) stays as it is.

    Args:
        codebook: [K, d], float32, bfloat16, float16 or float64.
        cluster_size: [K], float32 (float64 for a float64 codebook).
        embed_sum: [K, d], as `cluster_size`.
        x: rows [..., d] of any of these dtypes; double only where the codebook is.
        indices: as in `kexue_kernels.codebook_statistics`.
        decay: from 0 to 1; 1 keeps everything as it was counted before.
        eps: of Laplace smoothing, at least 0.
        backend: what counts and sums: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        `codebook`. Inputs are taken detached. Nothing is written where an argument is wrong.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a wrong shape, dtype, device or value, named.
        BackendUnavailableError: a forced backend that can't serve the call.

    Source: van den Oord et al. (2017), appendix A.1; Razavi et al., "Generating Diverse
    High-Fidelity Images with VQ-VAE-2" (2019), equation 2.
    """
    _check_running(codebook, cluster_size, embed_sum)
    arguments.indices_of(x, indices)
    wide = checks.state_dtype(codebook.dtype)
    allowed = checks.HALF_AND_SINGLE if wide == torch.float32 else (wide,)
    checks.dtype("x", x, allowed)
    checks.shape("x", x, (*x.shape[:-1], codebook.shape[1]), "[..., d]")
    checks.device("x", x, codebook.device, "codebook")
    for name, value in (("decay", decay), ("eps", eps)):
        arguments.number(name, value)
    if not 0 <= decay <= 1:
        raise ValueError(f"decay: expected a number from 0 to 1, got {decay}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: expected a number from 0 on, got {eps}")
    counts, sums = codebook_statistics(x, indices, codebook.shape[0], backend=backend)
    return ema_step_(codebook, cluster_size, embed_sum, counts, sums, decay, eps, backend)


@torch.no_grad()
def ema_step_(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_sum: Tensor,
    counts: Tensor,
    sums: Tensor,
    decay: float,
    eps: float,
    backend: str = "auto",
) -> Tensor:
    """`ema_update_` by counts and sums: [K, d] and [K], or of several codebooks with [G, …]."""
    running, backend = (codebook, cluster_size, embed_sum), dispatch.resolve(backend)
    if backend == "reference" or codebook.dtype in checks.DOUBLE:
        return reference.ema_step_(*running, counts, sums, decay, eps)
    _step(*running, counts, sums, decay, eps, backend)
    return codebook


@registry.operator(
    "ema_step(Tensor(a!) codebook, Tensor(b!) cluster_size, Tensor(c!) embed_sum, Tensor counts, "
    "Tensor sums, float decay, float eps, str backend) -> ()",
    fake=lambda *_: None,
    vmap=registry.refuse_vmap("ema_update_ updates its codebook in place"),
)
def _step(
    codebook: Tensor,
    cluster_size: Tensor,
    embed_sum: Tensor,
    counts: Tensor,
    sums: Tensor,
    decay: float,
    eps: float,
    backend: str,
) -> None:
    running = codebook, cluster_size, embed_sum
    launcher: ModuleType = blocked_ema_update  # a backend may have sums alone
    if backend == "auto" or launchers.implements("vq", "ema_update", backend):
        launcher = launchers.launcher_of("vq", "ema_update", backend, codebook)
    own = tuple(map(operators.plain, running))
    launcher.step(*own, counts, sums, decay, eps)
    for given, updated in zip(running, own, strict=True):
        if updated is not given:
            given.copy_(updated)
    torch.autograd.graph.increment_version(running)


def _check_running(codebook: Tensor, cluster_size: Tensor, embed_sum: Tensor) -> None:
    checks.tensor("codebook", codebook)
    checks.dtype("codebook", codebook, checks.REAL)
    checks.ndim("codebook", codebook, 2, "[K, d]")
    if codebook.shape[0] < 1:
        raise ValueError(f"codebook: expected at least one code, got {list(codebook.shape)}")
    _check_written("codebook", codebook)
    running = (
        ("cluster_size", cluster_size, codebook.shape[:1], "[K]"),
        ("embed_sum", embed_sum, codebook.shape, "[K, d]"),
    )
    for name, value, shape, axes in running:
        checks.tensor(name, value)
        checks.dtype(name, value, (checks.state_dtype(codebook.dtype),))
        checks.shape(name, value, tuple(shape), axes)
        checks.device(name, value, codebook.device, "codebook")
        _check_written(name, value)
    if embed_sum is codebook:
        raise ValueError("embed_sum: expected a tensor of its own, got codebook itself")


def _check_written(name: str, value: Tensor) -> None:
    checks.written(name, value)
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return
    if value.is_inference():
        raise ValueError(
            f"{name}: expected a tensor that may be written to outside inference mode, got one "
            f"made in inference mode"
        )
