"""mla_decode in PyTorch, a chunk of rows at a time: where no compiled kernel serves."""

import torch
from torch import Tensor

from kexue_kernels.autocast import without_autocast
from kexue_kernels.checks import state_dtype
from kexue_kernels.mla import fp8
from kexue_kernels.mla.reference import visible

CHUNK = 1024  # rows of the cache that are widened at once


@without_autocast
def forward(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    softmax_scale: float,
    causal: bool,
    num_splits: int | None,
) -> tuple[Tensor, Tensor]:
    del num_splits
    B, Tq, H, _ = q.shape
    out = q.new_empty(B, Tq, H, head_dim_v)
    lse = q.new_empty((B, H, Tq), dtype=state_dtype(q.dtype))
    reach = block_table.shape[1] * pages.shape[1]
    table = block_table.clamp(0, pages.shape[0] - 1)
    for b, length in enumerate(cache_seqlens.clamp(0, reach).tolist()):
        seen = visible(Tq, length, q.device).repeat_interleave(H, 0) if causal else None
        found = _attend(
            q[b].flatten(0, 1).to(lse.dtype) * softmax_scale, pages, table[b], length, seen,
            head_dim_v,
        )  # fmt: skip
        out[b] = found[0].unflatten(0, (Tq, H))
        lse[b] = found[1].unflatten(0, (Tq, H)).T
    return out, lse


def _attend(
    q: Tensor, pages: Tensor, table: Tensor, length: int, seen: Tensor | None, head_dim_v: int
) -> tuple[Tensor, Tensor]:
    """out [M, dv] and lse [M] of M = Tq*H rows of scaled queries."""
    block_size = pages.shape[1]
    step = max(1, CHUNK // block_size)  # in pages
    top = q.new_full(q.shape[:1], -torch.inf)
    total, out = torch.zeros_like(top), q.new_zeros(q.shape[0], head_dim_v)
    for page in range(0, -(-length // block_size), step):
        begin = page * block_size
        rows = pages[table[page : page + step]].flatten(0, 1)[: length - begin]
        rows = fp8.numbers(rows, head_dim_v, q.dtype)
        scores = q @ rows.T
        if seen is not None:
            scores.masked_fill_(~seen[:, begin : begin + rows.shape[0]], -torch.inf)
        new_top = torch.maximum(top, scores.amax(1))
        base = new_top.nan_to_num(neginf=0.0)
        weights = scores.sub_(base[:, None]).exp_()
        kept = (top - base).exp_()
        total = total * kept + weights.sum(1)
        out = torch.addmm(out * kept[:, None], weights, rows[:, :head_dim_v])
        top = new_top
    none = total == 0
    out = out / total.masked_fill(none, 1.0)[:, None]
    return out, total.log() + top.masked_fill(none, 0.0)
