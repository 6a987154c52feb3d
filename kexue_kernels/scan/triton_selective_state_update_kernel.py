"""selective_state_update's kernel: one step of the selective scan for all rows of a batch."""

import triton
import triton.language as tl

from kexue_kernels.scan.triton_selective_maths import LOG2_E, sigmoid, softplus


@triton.jit(do_not_specialize=["rows", "H", "groups"])
def selective_state_update_kernel(
    state_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, index_ptr, out_ptr,
    rows, H, P, n, groups,
    state_row, state_head, state_channel, state_n,
    x_row, x_head, x_channel, dt_row, dt_head, dt_channel, z_row, z_head, z_channel,
    A_head, A_channel, A_n, B_row, B_group, B_n, C_row, C_group, C_n,
    D_head, D_channel, bias_head, bias_channel,
    SOFTPLUS: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """state [rows, H, P, n] in place, and out [batch, H, P], contiguous, from x, dt and z [batch,
    H, P], A [H, P, n], B and C [batch, groups, n], and D and bias [H, P]: all by strides. A program
    has BLOCK_P channels of one head of row i of the batch, and the state index[i]."""
    blocks = tl.cdiv(P, BLOCK_P)
    block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks % H).to(tl.int64)
    i = (tl.program_id(0) // blocks // H).to(tl.int64)
    group = head // (H // groups)
    channels = block.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    states = tl.arange(0, N)[None, :].to(tl.int64)
    held = channels < P
    row = i
    if index_ptr is not None:
        row = tl.load(index_ptr + i)
    out_ptrs = out_ptr + (i * H + head) * P + channels
    if (row >= 0) & (row < rows):
        p = channels[:, None]
        mask = held[:, None] & (states < n)
        state_ptrs = state_ptr + row * state_row + head * state_head
        state_ptrs += p * state_channel + states * state_n
        A = tl.load(A_ptr + head * A_head + p * A_channel + states * A_n, mask=mask, other=0.0)
        state = tl.load(state_ptrs, mask=mask, other=0.0).to(tl.float32)
        B_ptrs = B_ptr + i * B_row + group * B_group + states * B_n
        C_ptrs = C_ptr + i * C_row + group * C_group + states * C_n
        B = tl.load(B_ptrs, mask=states < n, other=0.0).to(tl.float32)
        C = tl.load(C_ptrs, mask=states < n, other=0.0).to(tl.float32)
        x_ptrs = x_ptr + i * x_row + head * x_head + channels * x_channel
        x = tl.load(x_ptrs, mask=held, other=0.0).to(tl.float32)
        dt_ptrs = dt_ptr + i * dt_row + head * dt_head + channels * dt_channel
        dt = tl.load(dt_ptrs, mask=held, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            bias_ptrs = bias_ptr + head * bias_head + channels * bias_channel
            dt += tl.load(bias_ptrs, mask=held, other=0.0)
        if SOFTPLUS:
            dt = softplus(dt)
        state = state * tl.exp2(dt[:, None] * (A * LOG2_E)) + (dt * x)[:, None] * B
        tl.store(state_ptrs, state.to(state_ptr.dtype.element_ty), mask=mask)
        y = tl.sum(state * C, 1)
        if D_ptr is not None:
            D_ptrs = D_ptr + head * D_head + channels * D_channel
            y += x * tl.load(D_ptrs, mask=held, other=0.0)
        if z_ptr is not None:
            z_ptrs = z_ptr + i * z_row + head * z_head + channels * z_channel
            z = tl.load(z_ptrs, mask=held, other=0.0).to(tl.float32)
            y *= z * sigmoid(z)
        tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=held)
    else:
        tl.store(out_ptrs, tl.zeros((BLOCK_P,), out_ptr.dtype.element_ty), mask=held)
