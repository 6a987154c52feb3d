"""mla_attention's backward kernels: what all of them need of a row, keys and values, queries.

With P = exp(scale q k^T - lse), D = rowsum(grad out) and dS = P (grad v^T - D) scale:
dv = P^T grad, dk = dS^T q, dq = dS k. Names as in the forward's kernel; keys_kernel has its
tiles transposed, [N, M]: P^T grad and dS^T q take their first factor from registers.
"""

import triton
import triton.language as tl

from kexue_kernels.mla.triton_mla_attention_kernel import (
    columns,
    load_tile,
    offsets,
    product,
    store_tile,
    tile_of,
)
from kexue_kernels.triton_common import bound

LOG2E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(float("inf"))  # the lse of a row that isn't there: its weights are 0


@triton.jit
def delta_kernel(
    grad_ptr, out_ptr, delta_ptr, B, T, H, dv,
    stride_gb, stride_gt, stride_gh, stride_gd, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """delta [B, H, T] = rowsum(grad out), of rows in the order of out [B, T, H, dv]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    b, t, h = row // H // T, row // H % T, row % H
    column = tl.arange(0, BLOCK_V)
    mask = (b < B)[:, None] & (column < dv)[None, :]
    rows = b * stride_gb + t * stride_gt + h * stride_gh
    grad = tl.load(
        grad_ptr + rows[:, None] + (column.to(tl.int64) * stride_gd)[None, :], mask=mask, other=0.0
    )
    out = tl.load(out_ptr + (row * dv)[:, None] + column[None, :], mask=mask, other=0.0)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + (b * H + h) * T + t, delta, mask=b < B)


@triton.jit
def keys_kernel(
    q_ptr, q_rope_ptr, k_ptr, k_rope_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr,
    dk_ptr, dk_rope_ptr, dv_ptr,
    sequences_ptr, cu_seqlens_ptr, T, H, dk, dr, dv, scale,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_rb, stride_rt, stride_rh, stride_rd,
    stride_gb, stride_gt, stride_gh, stride_gd,
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_R: tl.constexpr, EVEN_V: tl.constexpr,
):  # fmt: skip
    """dk and dv [B, T, heads, .], and what each head has of dk_rope [B, T, heads, dr].

    A program holds BLOCK_N keys of a head and goes over the queries that see them.
    """
    h, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    b, begin, length, first = tile_of(
        tl.program_id(0), sequences_ptr, cu_seqlens_ptr, T, BLOCK_N, VARLEN
    )
    if first < length:
        n, m = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
        here = first + n < length
        row = ((b * T + begin + first) * heads + h).to(tl.int64)  # of k, dk, v, dv
        of_k, of_v = offsets(n, heads * dk, BLOCK_D, 1), offsets(n, heads * dv, BLOCK_V, 1)
        k = load_tile(k_ptr + row * dk + of_k, here, dk, EVEN_D)
        v = load_tile(v_ptr + row * dv + of_v, here, dv, EVEN_V)
        d_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        d_v = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        start_first = first // BLOCK_M * BLOCK_M if CAUSAL else first * 0
        token = begin + start_first
        q_ptr += b * stride_qb + token * stride_qt + h * stride_qh
        grad_ptr += b * stride_gb + token * stride_gt + h * stride_gh
        of_q = offsets(m, stride_qt, BLOCK_D, stride_qd)
        of_g = offsets(m, stride_gt, BLOCK_V, stride_gd)
        if BLOCK_R > 0:
            k_rope_ptr += (b * T + begin + first) * dr
            k_rope = load_tile(k_rope_ptr + offsets(n, dr, BLOCK_R, 1), here, dr, EVEN_R)
            d_k_rope = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
            q_rope_ptr += b * stride_rb + token * stride_rt + h * stride_rh
            of_r = offsets(m, stride_rt, BLOCK_R, stride_rd)
        lse_ptr += (b * H + h) * T + begin
        delta_ptr += (b * H + h) * T + begin

        for start in tl.range(bound(start_first), bound(length), BLOCK_M):
            inside = start + m < length
            q = load_tile(q_ptr + of_q, inside, dk, EVEN_D)
            weights = product(k, tl.trans(q), tl.zeros((BLOCK_N, BLOCK_M), tl.float32), PRECISION)
            if BLOCK_R > 0:
                q_rope = load_tile(q_rope_ptr + of_r, inside, dr, EVEN_R)
                weights = product(k_rope, tl.trans(q_rope), weights, PRECISION)
            lse = tl.load(lse_ptr + start + m, mask=inside, other=FAR) * LOG2E
            weights = tl.exp2(weights * (scale * LOG2E) - lse[None, :])
            if CAUSAL:
                if start < first + BLOCK_N:
                    seen = (first + n)[:, None] <= (start + m)[None, :]
                    weights = tl.where(seen, weights, 0.0)
            grad = load_tile(grad_ptr + of_g, inside, dv, EVEN_V)
            d_v = product(weights.to(grad.dtype), grad, d_v, PRECISION)
            delta = tl.load(delta_ptr + start + m, mask=inside, other=0.0)
            d_s = product(v, tl.trans(grad), tl.zeros((BLOCK_N, BLOCK_M), tl.float32), PRECISION)
            d_s = (weights * (d_s - delta[None, :])).to(q.dtype)
            d_k = product(d_s, q, d_k, PRECISION)
            if BLOCK_R > 0:
                d_k_rope = product(d_s, q_rope, d_k_rope, PRECISION)
                q_rope_ptr += BLOCK_M * tl.cast(stride_rt, tl.int64)
            q_ptr += BLOCK_M * tl.cast(stride_qt, tl.int64)
            grad_ptr += BLOCK_M * tl.cast(stride_gt, tl.int64)

        # Anew, as offsets kept across the loop would be spilled.
        rows, here = row + n.to(tl.int64) * heads, n < length - first
        store_tile(columns(dk_ptr, rows * dk, BLOCK_D), d_k * scale, here, dk, EVEN_D)
        store_tile(columns(dv_ptr, rows * dv, BLOCK_V), d_v, here, dv, EVEN_V)
        if BLOCK_R > 0:
            ptrs = columns(dk_rope_ptr, rows * dr, BLOCK_R)
            store_tile(ptrs, d_k_rope * scale, here, dr, EVEN_R)


@triton.jit
def queries_kernel(
    q_ptr, q_rope_ptr, k_ptr, k_rope_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr,
    dq_ptr, dq_rope_ptr,
    sequences_ptr, cu_seqlens_ptr, T, H, dk, dr, dv, scale,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_rb, stride_rt, stride_rh, stride_rd,
    stride_gb, stride_gt, stride_gh, stride_gd,
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_R: tl.constexpr, EVEN_V: tl.constexpr,
):  # fmt: skip
    """dq [B, T, H, dk] and dq_rope [B, T, H, dr] of as many of H heads as axis 1 has.

    A program holds BLOCK_M queries of a head and goes over the keys they see.
    """
    h, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # causal: the longest first
    b, begin, length, first = tile_of(program, sequences_ptr, cu_seqlens_ptr, T, BLOCK_M, VARLEN)
    if first < length:
        n, m = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
        here = first + m < length
        token = begin + first
        q_ptr += b * stride_qb + token * stride_qt + h * stride_qh
        q = load_tile(q_ptr + offsets(m, stride_qt, BLOCK_D, stride_qd), here, dk, EVEN_D)
        grad_ptr += b * stride_gb + token * stride_gt + h * stride_gh
        of_g = offsets(m, stride_gt, BLOCK_V, stride_gd)
        grad = load_tile(grad_ptr + of_g, here, dv, EVEN_V)
        row = b * T + begin
        k_ptr += (row * heads + h) * dk
        v_ptr += (row * heads + h) * dv
        of_k, of_v = offsets(n, heads * dk, BLOCK_D, 1), offsets(n, heads * dv, BLOCK_V, 1)
        wide_k, wide_v = heads.to(tl.int64) * dk, heads.to(tl.int64) * dv
        d_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        if BLOCK_R > 0:
            q_rope_ptr += b * stride_rb + token * stride_rt + h * stride_rh
            of_q_rope = offsets(m, stride_rt, BLOCK_R, stride_rd)
            q_rope = load_tile(q_rope_ptr + of_q_rope, here, dr, EVEN_R)
            k_rope_ptr += row * dr
            of_r = offsets(n, dr, BLOCK_R, 1)
            d_q_rope = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        at = (b * H + h) * T + token
        lse = tl.load(lse_ptr + at + m, mask=here, other=FAR) * LOG2E
        delta = tl.load(delta_ptr + at + m, mask=here, other=0.0)

        end = tl.minimum(first + BLOCK_M, length) if CAUSAL else length
        for start in tl.range(0, bound(end), BLOCK_N):
            inside = start + n < length  # the gradient of a key that isn't there is times 0
            k = load_tile(k_ptr + of_k, inside, dk, EVEN_D)
            weights = product(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
            if BLOCK_R > 0:
                k_rope = load_tile(k_rope_ptr + of_r, inside, dr, EVEN_R)
                weights = product(q_rope, tl.trans(k_rope), weights, PRECISION)
            weights = tl.exp2(weights * (scale * LOG2E) - lse[:, None])
            if CAUSAL:
                if start + BLOCK_N > first:
                    seen = (start + n)[None, :] <= (first + m)[:, None]
                    weights = tl.where(seen, weights, 0.0)
            v = load_tile(v_ptr + of_v, inside, dv, EVEN_V)
            d_s = product(grad, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
            d_s = (weights * (d_s - delta[:, None])).to(k.dtype)
            d_q = product(d_s, k, d_q, PRECISION)
            if BLOCK_R > 0:
                d_q_rope = product(d_s, k_rope, d_q_rope, PRECISION)
                k_rope_ptr += BLOCK_N * dr
            k_ptr += BLOCK_N * wide_k
            v_ptr += BLOCK_N * wide_v

        rows, here = (row + first + m) * H + h, m < length - first
        store_tile(columns(dq_ptr, rows * dk, BLOCK_D), d_q * scale, here, dk, EVEN_D)
        if BLOCK_R > 0:
            ptrs = columns(dq_rope_ptr, rows * dr, BLOCK_R)
            store_tile(ptrs, d_q_rope * scale, here, dr, EVEN_R)
