"""The registered operators of the mla family; none has a gradient.

Launcher modules `<backend>_<op>`, given non-empty plain tensors of any strides:

    mla_decode: forward(q [B, Tq, H, dc+dr], pages [num_blocks, block_size, dc+dr], block_table
        int32 [B, max_blocks], cache_seqlens int32 [B], head_dim_v, softmax_scale, causal,
        num_splits | None) -> (out [B, Tq, H, head_dim_v], lse float32 [B, H, Tq])
    mla_cache_append: append(kv_latent [T, dc], k_rope [T, dr], pages, slot_mapping int64 [T],
        norm_weight [dc] | None, norm_eps, cos [T, dr/2] | None, sin, rope_interleaved)

Pages of numbers have the dtype of q, or kv_latent. Rows of bytes, as in fp8.py, are uint8
[num_blocks, block_size, row_bytes] beside bfloat16, their bytes side by side and each at a multiple
of 4 bytes. They go to the modules `<backend>_<op>_fp8` alone, given the same arguments: a backend
serves them by having that module, and is refused for lack of it.
"""

from types import ModuleType

import torch
from torch import Tensor

from kexue_kernels import dispatch, registry
from kexue_kernels.checks import state_dtype
from kexue_kernels.launchers import launcher_of
from kexue_kernels.mla import arguments


def _decode_fake(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    softmax_scale: float,
    causal: bool,
    num_splits: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    B, Tq, H, _ = q.shape
    lse = q.new_empty((B, H, Tq), dtype=state_dtype(q.dtype))
    return q.new_empty((B, Tq, H, head_dim_v)), lse


@registry.operator(
    "mla_decode(Tensor q, Tensor pages, Tensor block_table, Tensor cache_seqlens, "
    "SymInt head_dim_v, float softmax_scale, bool causal, SymInt? num_splits, str backend) "
    "-> (Tensor out, Tensor lse)",
    fake=_decode_fake,
)
def mla_decode(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    softmax_scale: float,
    causal: bool,
    num_splits: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """out [B, Tq, H, head_dim_v] and lse [B, H, Tq] of q [B, Tq, H, dc+dr]."""
    arguments.rows_aligned(pages)
    launcher = _launcher("mla_decode", backend, q, pages)
    options = head_dim_v, softmax_scale, causal, num_splits
    empty = q.numel() == 0 or pages.numel() == 0 or block_table.numel() == 0
    if empty or not _checks(launcher, block_table, cache_seqlens):
        arguments.values_in_reach(block_table, cache_seqlens, pages)
    if empty:  # no keys
        out, lse = _decode_fake(q, pages, block_table, cache_seqlens, *options, backend)
        return out.zero_(), lse.fill_(-torch.inf)
    tables = block_table.int().contiguous(), cache_seqlens.int().contiguous()
    return launcher.forward(plain(q), plain(pages), *tables, *options)


def _append_fake(*_: object) -> None:
    """Nothing is returned."""


@registry.operator(
    "mla_cache_append(Tensor kv_latent, Tensor k_rope, Tensor(a!) pages, Tensor slot_mapping, "
    "Tensor? norm_weight, float norm_eps, Tensor? cos, Tensor? sin, bool rope_interleaved, "
    "str backend) -> ()",
    fake=_append_fake,
    vmap=registry.refuse_vmap("mla_cache_append writes into its cache"),
)
def mla_cache_append(
    kv_latent: Tensor,
    k_rope: Tensor,
    pages: Tensor,
    slot_mapping: Tensor,
    norm_weight: Tensor | None,
    norm_eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    rope_interleaved: bool,
    backend: str,
) -> None:
    """Rows of kv_latent [T, dc] and k_rope [T, dr] into pages, at slot_mapping [T]."""
    arguments.rows_aligned(pages)
    launcher = _launcher("mla_cache_append", backend, kv_latent, pages)
    if pages.numel() == 0 or not _checks(launcher):
        arguments.slots_in_reach(slot_mapping, pages)
    if slot_mapping.numel() and pages.numel():
        launcher.append(
            plain(kv_latent),
            plain(k_rope),
            pages,
            slot_mapping.long().contiguous(),
            plain(norm_weight),
            norm_eps,
            plain(cos),
            plain(sin),
            rope_interleaved,
        )
    torch.autograd.graph.increment_version(pages)


def check_backend(backend: str, pages: Tensor) -> None:
    """BackendUnavailableError where a forced backend can't both write to a cache and read it."""
    if dispatch.resolve(backend) not in ("auto", "reference"):
        for op in ("mla_cache_append", "mla_decode"):
            _launcher(op, backend, pages, pages)


def _launcher(op: str, backend: str, data: Tensor, pages: Tensor) -> ModuleType:
    return launcher_of("mla", f"{op}_fp8" if pages.dtype == torch.uint8 else op, backend, data)


def _checks(launcher: ModuleType, *int32: Tensor) -> bool:
    """Whether it looks at the values itself; it gets what is wider narrowed."""
    return getattr(launcher, "CHECKS_VALUES", False) and all(x.dtype == torch.int32 for x in int32)


def plain(x: Tensor | None) -> Tensor | None:
    """Without lazy negation, which a pointer does not show."""
    return x.resolve_neg() if x is not None and x.is_neg() else x
