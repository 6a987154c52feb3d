"""flash_mla_with_kvcache: `mla_decode` by the name and conventions of FlashMLA."""

import torch
from torch import Tensor

from kexue_kernels import checks, options
from kexue_kernels.mla import arguments, fp8
from kexue_kernels.mla.decode import mla_decode


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: object = None,
    num_splits: object = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """FlashMLA's dense decoding: the same arguments, results and conventions.

    Args:
        q: [B, Tq, H, dc + dr].
        k_cache: [num_blocks, block_size, 1, dc + dr]; any block_size. Or rows of bytes, as in
            `mla_decode`: [num_blocks, block_size, 1, 656] for 512 + 64.
        block_table: int32 [B, max_blocks].
        cache_seqlens: int32 [B].
        head_dim_v: columns of a row that are its value.
        tile_scheduler_metadata, num_splits: what FlashMLA's own scheduler makes: accepted, not
            needed.
        softmax_scale: (dc + dr)**-0.5 if None.
        causal: as in `mla_decode`, but False by default.
        is_fp8_kvcache: whether k_cache has rows of bytes; told by its dtype if None.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        out [B, Tq, H, head_dim_v] and lse [B, H, Tq], as `mla_decode`, but a query that sees no
        key has lse +inf.

    What it raises is what `mla_decode` does.
    """
    del tile_scheduler_metadata, num_splits
    checks.tensor("q", q)
    checks.ndim("q", q, 4, "[B, Tq, H, dc + dr]")
    checks.tensor("k_cache", k_cache)
    options.integer("head_dim_v", head_dim_v)
    if head_dim_v <= q.shape[3]:
        taken = arguments.in_cache_dtype(q, k_cache)
        arguments.pages(k_cache, head_dim_v, q.shape[3] - head_dim_v, taken, "q", "k_cache")
    if softmax_scale is None:
        softmax_scale = max(1, q.shape[3]) ** -0.5
    options.finite("softmax_scale", softmax_scale)
    if is_fp8_kvcache is not None:
        checks.boolean("is_fp8_kvcache", is_fp8_kvcache)
        if is_fp8_kvcache != (k_cache.dtype in fp8.DTYPES):
            dtype = str(k_cache.dtype).removeprefix("torch.")
            raise ValueError(
                f"is_fp8_kvcache: expected {not is_fp8_kvcache} for a k_cache of {dtype}, "
                f"got {is_fp8_kvcache}"
            )
    found = mla_decode(
        q, k_cache, block_table, cache_seqlens,
        head_dim_v=head_dim_v, softmax_scale=softmax_scale, causal=causal, return_lse=True,
        backend=backend,
    )  # fmt: skip
    assert isinstance(found, tuple)
    out, lse = found
    return out, lse.masked_fill(lse == -torch.inf, torch.inf)
