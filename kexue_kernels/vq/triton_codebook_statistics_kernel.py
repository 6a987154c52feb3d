"""Sums over the rows of each code: rows sorted by code, cut into chunks of equal length.

A program adds up the runs of equal keys in one chunk, row after row. A run that is all of a
code's rows is its sum; one that goes on beyond the chunk is a part of it, which `join_kernel`
adds to the others in order. So no code's rows are one program's work, and the order of the
additions depends on the indices alone.
"""

import triton
import triton.language as tl

from kexue_kernels.triton_common import inline


@inline
def factor_of(scale_ptr, terms_ptr, d):
    """2 scale / (terms d), as in the gradient of a mean square; 1 without a scale."""
    if scale_ptr is None:
        return 1.0
    else:
        terms = tl.maximum(tl.load(terms_ptr), 1).to(tl.float32) * d
        return 2 * tl.load(scale_ptr) / terms


@inline
def _place(d, BLOCK_D: tl.constexpr):
    """This program's chunk, and its channels [1, BLOCK_D] with which of them exist."""
    blocks = tl.cdiv(d, BLOCK_D)
    columns = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    return (tl.program_id(0) // blocks).to(tl.int64), columns, columns < d


@triton.jit(do_not_specialize=["K", "chunk"])
def chunk_kernel(
    x_ptr, codebook_ptr, scale_ptr, terms_ptr, keys_ptr, order_ptr, starts_ptr, out_ptr,
    parts_ptr, K, d, chunk, BATCH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [K, d], of the codes with rows in one chunk, and parts [chunks, 2, d] float32 of others.

    Row order[i] of x [N, d] has the code keys[i] [N], ascending; starts [K + 1] is where each
    code's rows begin. With a codebook, the code minus the row is what is added, and the sum is
    scaled. A part is the first of its chunk's two if it goes on from the chunk before, else the
    second.
    """
    number, columns, held = _place(d, BLOCK_D)
    begin = tl.maximum(number * chunk, tl.load(starts_ptr))
    stop = tl.load(starts_ptr + K)
    end = tl.minimum(number * chunk + chunk, stop)
    before = tl.load(keys_ptr + begin - 1, mask=(begin > 0) & (begin < end), other=-1)
    after = tl.load(keys_ptr + end, mask=end < stop, other=-1)
    factor = factor_of(scale_ptr, terms_ptr, d)
    total = tl.zeros((1, BLOCK_D), tl.float32)
    i = begin
    while i < end:
        keys = ()
        for r in tl.static_range(BATCH + 1):
            keys = keys + (tl.load(keys_ptr + i + r, mask=i + r < end, other=-1),)
        rows = ()
        codes = ()
        for r in tl.static_range(BATCH):  # all loads are on their way before a sum waits for one
            wanted = keys[r] >= 0
            row = tl.load(order_ptr + i + r, mask=wanted, other=0)
            rows = rows + (tl.load(x_ptr + row * d + columns, mask=held & wanted, other=0),)
            if codebook_ptr is not None:
                code_ptrs = codebook_ptr + keys[r].to(tl.int64) * d + columns
                codes = codes + (tl.load(code_ptrs, mask=held & wanted, other=0),)
        for r in tl.static_range(BATCH):
            value = rows[r].to(tl.float32)
            if codebook_ptr is not None:
                value = codes[r].to(tl.float32) - value
            total += value
            if keys[r] != keys[r + 1]:
                goes_on = keys[r] == before
                if goes_on | ((i + r + 1 == end) & (keys[r] == after)):
                    which = 2 * number + tl.where(goes_on, 0, 1)
                    tl.store(parts_ptr + which * d + columns, total, mask=held)
                else:
                    out_ptrs = out_ptr + keys[r].to(tl.int64) * d + columns
                    tl.store(out_ptrs, (factor * total).to(out_ptr.dtype.element_ty), mask=held)
                total = tl.zeros((1, BLOCK_D), tl.float32)
        i += BATCH


@triton.jit(do_not_specialize=["K", "chunk"])
def join_kernel(
    parts_ptr, scale_ptr, terms_ptr, keys_ptr, starts_ptr, out_ptr, K, d, chunk,
    PARTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [K, d] of the codes that have rows in several chunks, each in the program of the last."""
    number, columns, held = _place(d, BLOCK_D)
    begin = number * chunk
    key = tl.load(keys_ptr + begin)
    before = tl.load(keys_ptr + begin - 1, mask=begin > 0, other=-1)
    if (begin > 0) & (before == key) & (key >= 0) & (key < K):
        stop = tl.load(starts_ptr + key + 1)
        if stop <= begin + chunk:
            first = tl.load(starts_ptr + key) // chunk
            total = tl.zeros((PARTS, BLOCK_D), tl.float32)
            i = first
            while i <= number:
                chunks = i + tl.arange(0, PARTS)[:, None]
                which = 2 * chunks + tl.where(chunks == first, 1, 0)
                mask = held & (chunks <= number)
                total += tl.load(parts_ptr + which * d + columns, mask=mask, other=0)
                i += PARTS
            total = factor_of(scale_ptr, terms_ptr, d) * tl.sum(total, 0, keep_dims=True)
            out_ptrs = out_ptr + key.to(tl.int64) * d + columns
            tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=held)
