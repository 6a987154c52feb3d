"""A vector quantiser: a codebook, how it learns, and what it says about its use."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from kexue_kernels import checks, dispatch
from kexue_kernels.nn import arguments
from kexue_kernels.nn.vq import upkeep
from kexue_kernels.nn.vq.indices import check as check_indices
from kexue_kernels.vq import vector_quantize
from kexue_kernels.vq.arguments import GRADIENTS, METRICS, PRECISIONS
from kexue_kernels.vq.reference import codes_at
from kexue_kernels.vq.statistics import ema_step_

__all__ = ["VectorQuantizer"]

_USAGE_DECAY = 0.8  # of cluster_size, where no update of the codebook sets it


class VectorQuantizer(nn.Module):
    """Quantises rows to their nearest code; the codebook is learned, averaged or transformed.

    How the codebook comes to follow the rows:

    - learned (the default): a parameter, moved by the gradient of the codebook loss;
    - `ema_decay`: running means of the rows that chose each code, no gradient;
    - `simvq`: frozen random codes times one learned matrix, moved by the codebook loss: all
      codes move, also those that nobody chose.

    Args:
        dim: channels of the input.
        codebook_size: K, codes of each codebook.
        gradient, metric, precision: as in `kexue_kernels.vector_quantize`. With "cosine" rows
            and codes are scaled to norm 1, and so is what comes out.
        ema_decay: from 0 to 1; the codebook is then a buffer that training calls update.
        dead_code_threshold: in training, codes whose running count (`cluster_size`) falls below
            it are replaced by random rows of the batch; 0: never.
        simvq: see above.
        commitment_weight, codebook_weight: of the two parts of the loss; with `ema_decay` there
            is only the commitment loss.
        heads: the channels are cut into so many groups, each quantised on its own, with a
            codebook of its own, or all with one (`share_codebook`).
        kmeans_init: the first training call sets the codebook by k-means on its rows, in
            `kmeans_iters` steps from random ones.
        eps: of Laplace smoothing, as in `kexue_kernels.ema_update_`.
        sync: count, average and replace over all ranks of torch.distributed, as if their
            batches were one (None: where it is initialised).
        device, dtype: of the codebook; float32, bfloat16, float16 or float64.
        backend: what serves the operators, as in `kexue_kernels.vector_quantize`.

    State: `codes` [K, dim / heads] (with heads that don't share [heads, K, dim / heads]), a
    parameter where it is learned; `transform` with `simvq`; `cluster_size` and `embed_sum` where
    they are needed; `initialised`.

    After a call, `perplexity` and `usage` tell how the last batch (in training that of all
    ranks) used the codes.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a size, range, shape, dtype or device that doesn't fit, named.
        BackendUnavailableError: a forced backend that can't serve the call.

    Source: van den Oord et al. (2017), with appendix A.1 for `ema_decay`; Fifty et al. (2024)
    for "rotation"; Zhu et al., "Addressing Representation Collapse in Vector Quantized Models
    with One Linear Layer" (2024) for `simvq`; Dhariwal et al., "Jukebox" (2020), section 4.1,
    for the replacement of dead codes.
    """

    codes: Tensor
    cluster_size: Tensor
    embed_sum: Tensor
    initialised: Tensor
    last_counts: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        gradient: str = "ste",
        metric: str = "l2",
        ema_decay: float | None = None,
        dead_code_threshold: float = 0,
        simvq: bool = False,
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
        heads: int = 1,
        share_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        eps: float = 1e-5,
        sync: bool | None = None,
        precision: str = "exact",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _check_sizes(dim, codebook_size, heads, kmeans_iters)
        arguments.one_of("gradient", gradient, GRADIENTS)
        arguments.one_of("metric", metric, METRICS)
        arguments.one_of("precision", precision, PRECISIONS)
        flags = {"simvq": simvq, "share_codebook": share_codebook, "kmeans_init": kmeans_init}
        for name, flag in flags.items():
            checks.boolean(name, flag)
        if sync is not None:
            checks.boolean("sync", sync)
        _check_numbers(commitment_weight, codebook_weight, dead_code_threshold, eps, ema_decay)
        if simvq and (ema_decay is not None or dead_code_threshold > 0 or kmeans_init):
            raise ValueError(
                "simvq: its codes are frozen, expected no ema_decay, dead_code_threshold or "
                "kmeans_init beside it"
            )
        arguments.parameter_dtype(dtype)
        self.dim, self.codebook_size, self.heads = dim, codebook_size, heads
        self.share_codebook = share_codebook
        self.gradient, self.metric, self.precision = gradient, metric, precision
        self.ema_decay, self.dead_code_threshold, self.simvq = ema_decay, dead_code_threshold, simvq
        self.commitment_weight, self.codebook_weight = commitment_weight, codebook_weight
        self.kmeans_init, self.kmeans_iters, self.eps = kmeans_init, kmeans_iters, eps
        self.sync = sync
        self.backend = dispatch.check_name(backend)
        self._make_state(device, dtype)
        self.reset_parameters()
        self.register_load_state_dict_post_hook(_after_loading)

    def _make_state(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        width, G = self.dim // self.heads, self._groups
        shape = (G, self.codebook_size, width) if G > 1 else (self.codebook_size, width)
        codes = torch.empty(shape, device=device, dtype=dtype)
        if self.ema_decay is None and not self.simvq:
            self.codes = nn.Parameter(codes)
        else:
            self.register_buffer("codes", codes)
        if self.simvq:
            self.transform = nn.Parameter(codes.new_empty(*shape[:-2], width, width))
        wide = checks.state_dtype(codes.dtype)
        if self.ema_decay is not None or self.dead_code_threshold > 0:
            self.register_buffer("cluster_size", codes.new_empty(shape[:-1], dtype=wide))
        if self.ema_decay is not None:
            self.register_buffer("embed_sum", codes.new_empty(shape, dtype=wide))
        self.register_buffer("initialised", torch.tensor(True, device=device))
        counts = codes.new_zeros((G, self.codebook_size), dtype=torch.int64)
        self.register_buffer("last_counts", counts, persistent=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the codebook afresh: normal numbers over sqrt(dim / heads)."""
        self.codes.normal_(std=self.codes.shape[-1] ** -0.5)
        if self.metric == "cosine" and self.ema_decay is not None:
            self.codes.copy_(upkeep.unit(self.codes))
        if self.simvq:
            bound = self.codes.shape[-1] ** -0.5
            self.transform.uniform_(-bound, bound)
        if self.ema_decay is not None:
            self.embed_sum.copy_(self.codes)
        if hasattr(self, "cluster_size"):
            self.cluster_size.fill_(1)
        self.initialised.fill_(not self.kmeans_init)
        self._waiting = self.kmeans_init

    @property
    def _groups(self) -> int:
        """How many codebooks there are."""
        return 1 if self.share_codebook else self.heads

    @property
    def codebook(self) -> Tensor:
        """The codes in use [K, dim / heads] or [heads, K, dim / heads]; differentiable."""
        codes = self.codes
        if self.simvq:
            with torch.autocast(codes.device.type, enabled=False):
                codes = codes @ self.transform.mT
        if self.metric == "cosine" and self.ema_decay is None:
            codes = upkeep.unit(codes)
        return codes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(quantized, indices, loss) of x [..., dim] in any real floating dtype.

        quantized is in x's shape and dtype; indices int64 [...], with heads [..., heads], -1
        where a row is not finite; loss the weighted sum of commitment and codebook loss.
        """
        self._check(x)
        rows = self._rows(x)
        shared = self.training and upkeep.is_shared(self.sync)
        if self.training and self._waiting:
            self._initialise(rows.detach(), shared)
        codes = _grouped(self.codebook)
        if self.training and hasattr(self, "cluster_size"):
            codes = codes.clone()  # the backward needs them as they are before the update
        quantized, indices, commitment_loss, codebook_loss = vector_quantize(
            rows,
            codes,
            metric=self.metric,
            gradient=self.gradient,
            precision=self.precision,
            backend=self.backend,
        )
        loss = self.commitment_weight * commitment_loss
        if self.ema_decay is None:
            loss = loss + self.codebook_weight * codebook_loss
        self._observe(rows.detach(), indices, shared)
        return self._merged(quantized, x), self._merged_indices(indices, x), loss

    def decode(self, indices: Tensor) -> Tensor:
        """[..., dim] of indices [...], with heads [..., heads]; NaN where an index is -1.

        Any other index that is no code's raises on CPU.
        """
        check_indices(indices, self.codebook_size, (self.heads,) if self.heads > 1 else ())
        by_head = indices if self._groups == 1 else indices.movedim(-1, 0)
        found = codes_at(self.codebook, by_head.clamp(min=0))
        found = torch.where((by_head >= 0)[..., None], found, torch.nan)
        if self.heads == 1:
            return found
        return (found if self._groups == 1 else found.movedim(0, -2)).flatten(-2)

    @property
    def perplexity(self) -> float:
        """exp of the entropy of the codes' shares in the last batch, averaged over codebooks.

        Between 1 and codebook_size; NaN before the first batch. Reading it waits for the device.
        """
        shares = self.last_counts / self.last_counts.sum(-1, keepdim=True)
        return torch.special.entr(shares.double()).sum(-1).exp().mean().item()

    @property
    def usage(self) -> float:
        """The share of codes that the last batch used, 0 to 1. Reading it waits for the device."""
        return (self.last_counts > 0).double().mean().item()

    def _check(self, x: Tensor) -> None:
        checks.tensor("x", x)
        checks.dtype("x", x, checks.REAL)
        if x.ndim < 1 or x.shape[-1] != self.dim:
            raise ValueError(f"x: expected shape [..., {self.dim}], got {list(x.shape)}")
        checks.device("x", x, self.codes.device, "the module")

    def _rows(self, x: Tensor) -> Tensor:
        """[groups, rows, dim / heads] in the codebook's dtype."""
        width = self.dim // self.heads
        rows = x.reshape(math.prod(x.shape[:-1]), self.heads, width).to(self.codes.dtype)
        rows = rows.transpose(0, 1) if self._groups > 1 else rows.reshape(1, -1, width)
        return upkeep.unit(rows) if self.metric == "cosine" else rows

    def _merged(self, quantized: Tensor, x: Tensor) -> Tensor:
        quantized = quantized.transpose(0, 1) if self._groups > 1 else quantized
        return quantized.reshape(x.shape).to(x.dtype)

    def _merged_indices(self, indices: Tensor, x: Tensor) -> Tensor:
        indices = indices.mT if self._groups > 1 else indices
        return indices.reshape(x.shape[:-1] if self.heads == 1 else (*x.shape[:-1], self.heads))

    @torch.no_grad()
    def _initialise(self, rows: Tensor, shared: bool) -> None:
        codes = _grouped(self.codes)
        means, counts = upkeep.k_means(
            rows, codes, self.kmeans_iters, self.metric, shared, self.backend
        )
        codes.copy_(means)
        if hasattr(self, "cluster_size"):
            _grouped(self.cluster_size, 1).copy_(counts)
        if self.ema_decay is not None:
            _grouped(self.embed_sum).copy_(means * counts[..., None])
        self.initialised.fill_(True)
        self._waiting = False

    @torch.no_grad()
    def _observe(self, rows: Tensor, indices: Tensor, shared: bool) -> None:
        """Count the batch; in training, let the codebook follow it."""
        averaged = self.training and self.ema_decay is not None
        if averaged:
            counts, sums = upkeep.statistics_of(rows, indices, self.codebook_size, self.backend)
            counts, sums = upkeep.summed(counts, shared), upkeep.summed(sums, shared)
            self._average(counts, sums)
        else:
            counts = upkeep.summed(upkeep.counts_of(indices, self.codebook_size), shared)
        self.last_counts = counts
        if self.training and self.dead_code_threshold > 0:
            size = _grouped(self.cluster_size, 1)
            if not averaged:
                size.lerp_(counts.to(size.dtype), 1 - _USAGE_DECAY)
            self._replace(rows, size, shared)

    def _average(self, counts: Tensor, sums: Tensor) -> None:
        assert self.ema_decay is not None
        codes = _grouped(self.codes)
        size, total = _grouped(self.cluster_size, 1), _grouped(self.embed_sum)
        ema_step_(codes, size, total, counts, sums, self.ema_decay, self.eps, self.backend)
        if self.metric == "cosine":
            codes.copy_(upkeep.unit(codes))

    def _replace(self, rows: Tensor, size: Tensor, shared: bool) -> None:
        """Dead codes become rows of the batch, counted as often as it takes to live."""
        values, got = upkeep.drawn(rows, size < self.dead_code_threshold, shared, again=False)
        codes = _grouped(self.codes)
        codes.copy_(torch.where(got[..., None], values, codes))
        size.masked_fill_(got, self.dead_code_threshold)
        if self.ema_decay is not None:
            total = _grouped(self.embed_sum)
            total.copy_(torch.where(got[..., None], values * self.dead_code_threshold, total))

    def extra_repr(self) -> str:
        """The sizes, and what is not as by default."""
        given: dict[str, tuple[Any, Any]] = {
            "gradient": (self.gradient, "ste"),
            "metric": (self.metric, "l2"),
            "ema_decay": (self.ema_decay, None),
            "dead_code_threshold": (self.dead_code_threshold, 0),
            "simvq": (self.simvq, False),
            "heads": (self.heads, 1),
            "share_codebook": (self.share_codebook, False),
            "backend": (self.backend, "auto"),
        }
        named = [f"{name}={value!r}" for name, (value, usual) in given.items() if value != usual]
        return ", ".join([str(self.dim), str(self.codebook_size), *named])


def _grouped(x: Tensor, axes: int = 2) -> Tensor:
    """A view with a first axis of codebooks; without it x has so many axes."""
    return x if x.ndim > axes else x[None]


def _after_loading(module: nn.Module, _: Any) -> None:
    assert isinstance(module, VectorQuantizer)
    module._waiting = not bool(module.initialised)


def _check_sizes(dim: int, codebook_size: int, heads: int, kmeans_iters: int) -> None:
    arguments.size("dim", dim)
    arguments.size("codebook_size", codebook_size)
    arguments.size("heads", heads)
    arguments.size("kmeans_iters", kmeans_iters, smallest=0)
    if dim % heads:
        raise ValueError(f"heads: expected a divisor of dim = {dim}, got {heads}")


def _check_numbers(
    commitment_weight: float,
    codebook_weight: float,
    dead_code_threshold: float,
    eps: float,
    ema_decay: float | None,
) -> None:
    numbers = {
        "commitment_weight": commitment_weight,
        "codebook_weight": codebook_weight,
        "dead_code_threshold": dead_code_threshold,
        "eps": eps,
    }
    for name, value in numbers.items():
        arguments.number(name, value)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a number from 0 on, got {value}")
    if ema_decay is not None:
        arguments.number("ema_decay", ema_decay)
        if not 0 <= ema_decay <= 1:
            raise ValueError(f"ema_decay: expected a number from 0 to 1, got {ema_decay}")
