"""mla_cache_append's kernel: one token's latent, normalised, and its key, turned, at their slot."""

import triton
import triton.language as tl

from kexue_kernels.mla.triton_fp8 import key_pointers, store_latent
from kexue_kernels.triton_common import narrow


@triton.jit
def append_kernel(
    latent_ptr, rope_ptr, pages_ptr, slot_ptr, weight_ptr, cos_ptr, sin_ptr,
    dc, dr, slots, block_size, eps,
    stride_latent_t, stride_latent_c, stride_rope_t, stride_rope_r,
    stride_page_b, stride_page_p, stride_page_c,
    stride_weight, stride_cos_t, stride_cos_r, stride_sin_t, stride_sin_r,
    INTERLEAVED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr, FP8: tl.constexpr = False,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + t)
    if (slot >= 0) & (slot < slots):
        row_ptr = pages_ptr + slot // block_size * stride_page_b + slot % block_size * stride_page_p
        c = tl.arange(0, BLOCK_C)
        x_ptrs = latent_ptr + t * stride_latent_t + c.to(tl.int64) * stride_latent_c
        x = tl.load(x_ptrs, mask=c < dc, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + c * stride_weight, mask=c < dc, other=0.0)
            mean_square = tl.sum(x * x, axis=0) / dc
            x = x * (1 / tl.sqrt_rn(mean_square + eps)) * weight.to(tl.float32)
        if FP8:
            store_latent(row_ptr, x, dc, BLOCK_C)
            row_ptr = key_pointers(row_ptr, dc)
        else:
            x = narrow(x, pages_ptr.dtype.element_ty)
            tl.store(row_ptr + c.to(tl.int64) * stride_page_c, x, mask=c < dc)
            row_ptr += tl.cast(dc, tl.int64) * stride_page_c

        data = row_ptr.dtype.element_ty
        key_ptr = rope_ptr + t * stride_rope_t
        if cos_ptr is None:
            r = tl.arange(0, BLOCK_R).to(tl.int64)
            key = tl.load(key_ptr + r * stride_rope_r, mask=r < dr, other=0.0)
            tl.store(row_ptr + r * stride_page_c, key, mask=r < dr)
        else:
            i = tl.arange(0, BLOCK_H).to(tl.int64)
            half = dr // 2
            inside = i < half
            first = 2 * i if INTERLEAVED else i
            second = 2 * i + 1 if INTERLEAVED else i + half
            x1 = tl.load(key_ptr + first * stride_rope_r, mask=inside, other=0.0).to(tl.float32)
            x2 = tl.load(key_ptr + second * stride_rope_r, mask=inside, other=0.0).to(tl.float32)
            cos_ptrs = cos_ptr + t * stride_cos_t + i * stride_cos_r
            sin_ptrs = sin_ptr + t * stride_sin_t + i * stride_sin_r
            cos = tl.load(cos_ptrs, mask=inside, other=0.0).to(tl.float32)
            sin = tl.load(sin_ptrs, mask=inside, other=0.0).to(tl.float32)
            turned = narrow(x1 * cos - x2 * sin, data)
            tl.store(row_ptr + first * stride_page_c, turned, mask=inside)
            turned = narrow(x2 * cos + x1 * sin, data)
            tl.store(row_ptr + second * stride_page_c, turned, mask=inside)
