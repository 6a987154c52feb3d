"""mla_decode's kernels: softmax attention over a split of each sequence, and what joins splits.

A program holds BLOCK_M queries, heads within tokens, of one sequence. A block of the cache's rows
is read once: it is the keys and, its first columns, the values. Names: M queries, N rows of the
cache, V columns of the value and R of what lies beyond it. With FP8 the rows are those of fp8.py.
"""

import triton
import triton.language as tl

from kexue_kernels.mla.triton_fp8 import key_pointers, load_latents
from kexue_kernels.triton_common import bound, dot, inline, narrow

LN2 = tl.constexpr(0.6931471805599453)
NONE = tl.constexpr(float("-inf"))


@inline
def load_columns(ptrs, stride, first, count, rows, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """[rows, BLOCK] from column `first` on, 0 beyond `count` columns and where not of `rows`."""
    columns = tl.arange(0, BLOCK)[None, :]
    ptrs = ptrs + (first + columns).to(tl.int64) * stride
    if EVEN:
        return tl.load(ptrs, mask=rows, other=0.0)
    else:
        return tl.load(ptrs, mask=rows & (columns < count), other=0.0)


@inline
def row_pointers(
    pages_ptr, table_ptr, n, inside, num_blocks, block_size, stride_block, stride_place
):
    """[N, 1]: where token n of the sequence lies. Ids of no block are clamped to the nearest."""
    block = tl.load(table_ptr + n // block_size, mask=inside, other=0)
    block = tl.minimum(tl.maximum(block, 0), num_blocks - 1).to(tl.int64)
    place = (n % block_size).to(tl.int64)
    return pages_ptr + (block * stride_block + place * stride_place)[:, None]


@triton.jit
def decode_kernel(
    q_ptr, pages_ptr, table_ptr, seqlens_ptr, out_ptr, lse_ptr,
    B, Tq, H, head_dim_v, rest, num_blocks, block_size, max_blocks, splits, scale,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_block, stride_place, stride_channel,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
    EVEN_V: tl.constexpr, EVEN_R: tl.constexpr, FP8: tl.constexpr = False,
):  # fmt: skip
    """out [splits, B, Tq, H, head_dim_v] and lse [splits, B, H, Tq], natural, of each split.

    scale is softmax_scale log2(e); `rest` counts the columns beyond the value.
    """
    tiles = tl.cdiv(Tq * H, BLOCK_M)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    split = tl.program_id(1)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    here = m < Tq * H
    t, h = m // H, m % H
    q_ptrs = q_ptr + b * stride_qb + (t.to(tl.int64) * stride_qt + h * stride_qh)[:, None]
    q_v = load_columns(q_ptrs, stride_qd, 0, head_dim_v, here[:, None], BLOCK_V, EVEN_V)
    if BLOCK_R > 0:
        q_r = load_columns(q_ptrs, stride_qd, head_dim_v, rest, here[:, None], BLOCK_R, EVEN_R)

    length = tl.load(seqlens_ptr + b)
    length = tl.minimum(tl.maximum(length, 0), max_blocks * block_size)
    share = tl.cdiv(tl.cdiv(length, BLOCK_N), splits) * BLOCK_N
    begin = split * share
    end = tl.minimum(begin + share, length)
    last = length - Tq + t if CAUSAL else tl.full((BLOCK_M,), 2**31 - 1, tl.int32)
    table_ptr += b * max_blocks

    top = tl.full((BLOCK_M,), NONE, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in tl.range(bound(begin), bound(end), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < end
        ptrs = row_pointers(
            pages_ptr, table_ptr, n, inside, num_blocks, block_size, stride_block, stride_place
        )
        if FP8:
            kv = load_latents(ptrs, head_dim_v, inside[:, None], BLOCK_N, BLOCK_V, EVEN_V)
        else:
            kv = load_columns(ptrs, stride_channel, 0, head_dim_v, inside[:, None], BLOCK_V, EVEN_V)
        scores = dot(q_v, tl.trans(kv), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        if BLOCK_R > 0:
            if FP8:
                ptrs = key_pointers(ptrs, head_dim_v)
                k_r = load_columns(ptrs, 1, 0, rest, inside[:, None], BLOCK_R, EVEN_R)
            else:
                k_r = load_columns(
                    ptrs, stride_channel, head_dim_v, rest, inside[:, None], BLOCK_R, EVEN_R
                )
            scores = dot(q_r, tl.trans(k_r), scores)
        seen = inside[None, :] & (n[None, :] <= last[:, None])
        scores = tl.where(seen, scores * scale, NONE)
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(new_top == NONE, 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        kept = tl.exp2(top - base)
        total = total * kept + tl.sum(weights, axis=1)
        acc = dot(narrow(weights, kv.dtype), kv, acc * kept[:, None])
        top = new_top

    none = total == 0
    acc = acc / tl.where(none, 1.0, total)[:, None]
    lse = tl.where(none, NONE, (top + tl.log2(tl.where(none, 1.0, total))) * LN2)
    at = split * B + b
    out_ptrs = out_ptr + ((at * Tq * H + m) * head_dim_v)[:, None] + tl.arange(0, BLOCK_V)[None, :]
    columns = (tl.arange(0, BLOCK_V) < head_dim_v)[None, :]
    tl.store(out_ptrs, narrow(acc, out_ptr.dtype.element_ty), mask=here[:, None] & columns)
    tl.store(lse_ptr + at * Tq * H + h * Tq + t, lse, mask=here)


@triton.jit
def join_kernel(
    parts_ptr, part_lse_ptr, out_ptr, lse_ptr, B, Tq, H, head_dim_v, splits,
    BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """out [B, Tq, H, head_dim_v] and lse [B, H, Tq] of all splits, in order: one query each."""
    row = tl.program_id(0).to(tl.int64)  # b, t, h
    first = tl.program_id(1) * BLOCK_V
    b, t, h = row // (Tq * H), row // H % Tq, row % H
    rows = tl.cast(B, tl.int64) * Tq * H
    at = (b * H + h) * Tq + t
    split = tl.arange(0, BLOCK_S)
    lses = tl.load(part_lse_ptr + split * rows + at, mask=split < splits, other=NONE)
    top = tl.max(lses, axis=0)
    base = tl.where(top == NONE, 0.0, top)
    total = tl.sum(tl.exp(lses - base), axis=0)
    lse = tl.where(total == 0, NONE, base + tl.log(tl.where(total == 0, 1.0, total)))
    columns = first + tl.arange(0, BLOCK_V)
    acc = tl.zeros((BLOCK_V,), tl.float32)
    for s in tl.range(0, bound(splits)):
        part = tl.load(part_lse_ptr + s * rows + at)
        weight = tl.exp(part - tl.where(lse == NONE, 0.0, lse))
        ptrs = parts_ptr + (s * rows + row) * head_dim_v + columns
        acc += weight * tl.load(ptrs, mask=columns < head_dim_v, other=0.0)
    out_ptrs = out_ptr + row * head_dim_v + columns
    tl.store(out_ptrs, narrow(acc, out_ptr.dtype.element_ty), mask=columns < head_dim_v)
    if first == 0:
        tl.store(lse_ptr + at, lse)
