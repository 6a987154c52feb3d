"""mla_decode: attention of a few new tokens over a paged cache of latents."""

from torch import Tensor

from kexue_kernels import checks, dispatch, launchers, options
from kexue_kernels.mla import arguments, operators, reference


def mla_decode(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    head_dim_v: int,
    softmax_scale: float,
    causal: bool = True,
    num_splits: int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-head latent attention over a paged cache, with the projections absorbed into q.

    A cached row, dc + dr wide, is the key of every head; its first `head_dim_v` columns are the
    value. out = softmax(q k^T softmax_scale) v, over the rows of q's own sequence.

    Args:
        q: [B, Tq, H, dc + dr], Tq new tokens of each sequence; float32, bfloat16 or float16
            (float64 is served by the reference). Any strides.
        kv_cache: [num_blocks, block_size, dc + dr], or with a 1 before the last axis; q's dtype.
            Or FlashMLA's rows of bytes, beside a bfloat16 q: uint8 or float8_e4m3fn
            [num_blocks, block_size, dc + dc/32 + 2 dr], that is 656 for 512 + 64. A row is dc
            float8_e4m3fn, a float32 scale for each 128 of them and dr bfloat16; dc is head_dim_v.
            It is read as bfloat16; rows lie at multiples of 4 bytes.
        block_table: int32 [B, max_blocks]: token j of a sequence is in block
            block_table[b, j // block_size], at place j % block_size. A block may serve several
            sequences.
        cache_seqlens: int32 [B], tokens of each sequence, the Tq new ones included.
        head_dim_v: columns of a row that are its value, from 1 to dc + dr.
        softmax_scale: what scores are multiplied by: (qk_nope_head_dim + qk_rope_head_dim)**-0.5
            in DeepSeek-V2.
        causal: query i sees keys j <= cache_seqlens[b] - Tq + i; else all of them.
        num_splits: into how many parts a kernel cuts each sequence; chosen from the shapes if
            None.
        return_lse: also return the logarithm of the sum of exponentials.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        out [B, Tq, H, head_dim_v] in q's dtype; with `return_lse` also lse [B, H, Tq], natural,
        float32 (float64 for float64). A query that sees no key gets 0 and -inf.

    What lies beyond a sequence's end, in its last block or in its row of the table, is never
    read into the result: it may be NaN, or no block's id. Lengths beyond the table's reach and ids
    of no block raise on CPU; on GPUs, which read nothing back to the host, they are clamped to
    the nearest. Under autocast q is taken in the cache's dtype.

    For inference: an input that requires grad, in grad mode, raises.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a wrong shape, dtype, device or value, named.
        BackendUnavailableError: a forced backend that can't serve the call.
        RuntimeError: an input requires grad.

    Source: DeepSeek-AI, "DeepSeek-V2" (2024), section 2.1.2 and appendix C; pages as in Kwon et
    al., "Efficient Memory Management for Large Language Model Serving" (2023).
    """
    checks.tensor("q", q)
    checks.tensor("kv_cache", kv_cache)
    q = arguments.in_cache_dtype(q, kv_cache)
    checks.dtype("q", q, checks.REAL)
    checks.ndim("q", q, 4, "[B, Tq, H, dc + dr]")
    options.integer("head_dim_v", head_dim_v)
    if head_dim_v > q.shape[3]:
        raise ValueError(f"head_dim_v: expected at most dc + dr = {q.shape[3]}, got {head_dim_v}")
    pages = arguments.pages(kv_cache, head_dim_v, q.shape[3] - head_dim_v, q, "q")
    arguments.tables(block_table, cache_seqlens, q.shape[0], q, "q")
    options.finite("softmax_scale", softmax_scale)
    checks.boolean("causal", causal)
    checks.boolean("return_lse", return_lse)
    if num_splits is not None:
        options.integer("num_splits", num_splits)
    arguments.for_inference("mla_decode", q, kv_cache)
    backend = dispatch.resolve(backend)
    if launchers.served_by_reference("mla_decode", q, backend):
        arguments.values_in_reach(block_table, cache_seqlens, pages)
        return reference.mla_decode(
            q, pages, block_table, cache_seqlens,
            head_dim_v=head_dim_v, softmax_scale=softmax_scale, causal=causal,
            return_lse=return_lse,
        )  # fmt: skip
    out, lse = operators.mla_decode(
        q, pages, block_table, cache_seqlens,
        head_dim_v, float(softmax_scale), causal, num_splits, backend,
    )  # fmt: skip
    return (out, lse) if return_lse else out
