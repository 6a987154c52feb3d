"""mla_attention's forward kernel: flash attention over the keys and values of a group of heads.

Queries and keys are two tiles each, what a head has of its own [., D] and what carries positions
[., R]; no value is widened to a key's width. Names: M queries, N keys, D, R and V columns.
"""

import triton
import triton.language as tl

from kexue_kernels import dispatch
from kexue_kernels.triton_common import bound, inline

LN2 = tl.constexpr(0.6931471805599453)
NONE = tl.constexpr(float("-inf"))
_INTERPRETING = tl.constexpr(dispatch.interpreting())


@inline
def product(x, y, sums, PRECISION: tl.constexpr):
    """x y + sums [M, N] in float32."""
    if _INTERPRETING:  # where products of bfloat16 are wrong
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, sums, input_precision=PRECISION)


@inline
def load_tile(ptrs, rows, count, EVEN: tl.constexpr):
    """[rows, columns] of ptrs; 0 where not of `rows`, and beyond `count` columns if not EVEN."""
    if EVEN:
        return tl.load(ptrs, mask=rows[:, None], other=0.0)
    else:
        column = tl.arange(0, ptrs.shape[1])
        return tl.load(ptrs, mask=rows[:, None] & (column < count)[None, :], other=0.0)


@inline
def store_tile(ptrs, x, rows, count, EVEN: tl.constexpr):
    column = tl.arange(0, ptrs.shape[1])
    mask = rows[:, None] if EVEN else rows[:, None] & (column < count)[None, :]
    tl.store(ptrs, x.to(ptrs.dtype.element_ty), mask=mask)


@inline
def offsets(rows, stride, BLOCK: tl.constexpr, stride_column):
    """[rows, BLOCK], of 32 bits."""
    return rows[:, None] * stride + tl.arange(0, BLOCK)[None, :] * stride_column


@inline
def columns(ptr, rows, BLOCK: tl.constexpr):
    """[rows, BLOCK], of 64 bits."""
    return ptr + rows[:, None] + tl.arange(0, BLOCK)[None, :]


@inline
def tile_of(
    program, sequences_ptr, cu_seqlens_ptr, T, BLOCK: tl.constexpr, VARLEN: tl.constexpr
):  # fmt: skip
    """A program's place: its batch entry, its sequence's first token and length, its first row.

    With cu_seqlens, sequence s has the programs from cu_seqlens[s] // BLOCK + s on: as many as
    it has tiles, or one more, which finds no row. Boundaries are kept inside the tensors.
    """
    if VARLEN:
        s = tl.load(sequences_ptr + program)
        begin = tl.load(cu_seqlens_ptr + s)
        first = (program - begin // BLOCK - s) * BLOCK
        begin = tl.minimum(tl.maximum(begin, 0), T)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + s + 1), begin), T)
        length = end - begin
        b = begin * 0
        first = tl.where(first < 0, length, first)
    else:
        tiles = tl.cdiv(T, BLOCK)
        b = program // tiles
        first = program % tiles * BLOCK
        begin = b * 0
        length = T + begin
    return b.to(tl.int64), begin.to(tl.int64), length, first


@triton.jit
def forward_kernel(
    q_ptr, q_rope_ptr, k_ptr, k_rope_ptr, v_ptr, out_ptr, lse_ptr,
    sequences_ptr, cu_seqlens_ptr, T, H, dk, dr, dv, scale,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_rb, stride_rt, stride_rh, stride_rd,
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_R: tl.constexpr, EVEN_V: tl.constexpr,
):  # fmt: skip
    """out [B, T, H, dv] and lse [B, H, T], natural, of as many of H heads as axis 1 has.

    k [B, T, heads, dk] and v [B, T, heads, dv] are those heads' own, k_rope [B, T, dr] is of all.
    scale is softmax_scale log2(e), and positive.
    """
    h, heads = tl.program_id(1), tl.num_programs(1)
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # causal: the longest first
    b, begin, length, first = tile_of(program, sequences_ptr, cu_seqlens_ptr, T, BLOCK_M, VARLEN)
    if first < length:
        m = tl.arange(0, BLOCK_M)
        here = first + m < length
        token = begin + first
        q_ptr += b * stride_qb + token * stride_qt + h.to(tl.int64) * stride_qh
        q = load_tile(q_ptr + offsets(m, stride_qt, BLOCK_D, stride_qd), here, dk, EVEN_D)
        if BLOCK_R > 0:
            q_rope_ptr += b * stride_rb + token * stride_rt + h.to(tl.int64) * stride_rh
            q_rope_ptrs = q_rope_ptr + offsets(m, stride_rt, BLOCK_R, stride_rd)
            q_rope = load_tile(q_rope_ptrs, here, dr, EVEN_R)
        row = b * T + begin
        k_ptr += (row * heads + h) * dk
        v_ptr += (row * heads + h) * dv
        k_rope_ptr += row * dr
        n = tl.arange(0, BLOCK_N)
        of_k = offsets(n, heads * dk, BLOCK_D, 1)
        of_v = offsets(n, heads * dv, BLOCK_V, 1)
        if BLOCK_R > 0:
            of_r = offsets(n, dr, BLOCK_R, 1)
        last = tl.minimum(first + m, length - 1) if CAUSAL else length - 1 + m * 0
        end = tl.minimum(first + BLOCK_M, length) if CAUSAL else length
        whole = (first if CAUSAL else length) // BLOCK_N * BLOCK_N  # keys in blocks all see
        wide_k, wide_v = heads.to(tl.int64) * dk, heads.to(tl.int64) * dv
        top = tl.full((BLOCK_M,), NONE, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
        for start in tl.range(0, bound(end), BLOCK_N):
            inside = start + n < length
            k = load_tile(k_ptr + of_k, inside, dk, EVEN_D)
            scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            scores = product(q, tl.trans(k), scores, PRECISION)
            if BLOCK_R > 0:
                k_rope = load_tile(k_rope_ptr + of_r, inside, dr, EVEN_R)
                scores = product(q_rope, tl.trans(k_rope), scores, PRECISION)
            v = load_tile(v_ptr + of_v, inside, dv, EVEN_V)
            if start >= whole:
                scores = tl.where((start + n)[None, :] <= last[:, None], scores, NONE)
            new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
            weights = tl.exp2(scores * scale - new_top[:, None])
            kept = tl.exp2(top - new_top)
            total = total * kept + tl.sum(weights, axis=1)
            acc = product(weights.to(v.dtype), v, acc * kept[:, None], PRECISION)
            top = new_top
            k_ptr += BLOCK_N * wide_k
            v_ptr += BLOCK_N * wide_v
            k_rope_ptr += BLOCK_N * dr

        acc = acc / total[:, None]
        # Anew, as offsets kept across the loop would be spilled.
        rows, here = (row + first + m) * H + h, m < length - first
        store_tile(columns(out_ptr, rows * dv, BLOCK_V), acc, here, dv, EVEN_V)
        lse_ptr += (b * H + h) * T + begin + first
        tl.store(lse_ptr + m, (top + tl.log2(total)) * LN2, mask=here)
