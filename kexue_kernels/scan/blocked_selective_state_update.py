"""selective_state_update in PyTorch, all sequences at once: where no compiled kernel serves."""

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus


def update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state_batch_indices: Tensor | None,
    out: Tensor,
) -> None:
    if state_batch_indices is not None:
        live = state_batch_indices >= 0
        indices, x, dt, B, C = (m[live] for m in (state_batch_indices, x, dt, B, C))
        z = None if z is None else z[live]
    before = state if state_batch_indices is None else state[indices]
    heads = x.shape[1] // B.shape[1]
    x, dt, B, C = x.float(), dt.float(), B.float(), C.float()
    B, C = (m.repeat_interleave(heads, 1).unsqueeze(2) for m in (B, C))  # [batch, H, 1, n]
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = softplus(dt)
    after = before * torch.exp(dt.unsqueeze(-1) * A) + (dt * x).unsqueeze(-1) * B
    y = (after * C).sum(-1)
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * silu(z.float())
    if state_batch_indices is None:
        state.copy_(after)
        out.copy_(y)
    else:
        state[indices] = after.to(state.dtype)
        out.zero_()
        out[live] = y.to(out.dtype)
