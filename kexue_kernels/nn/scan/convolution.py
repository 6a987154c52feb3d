"""The short causal convolution of a Mamba mixer, each channel on its own, channels last.

A window is the convolution's last inputs [B, K - 1, d], K being its taps (or more of them: the
oldest are then carried along but have no effect).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue_kernels.checks import cu_seqlens_values
from kexue_kernels.scan import mamba_operators


def convolved(x: Tensor, window: Tensor | None, conv: nn.Conv1d) -> tuple[Tensor, Tensor]:
    """The causal convolution of x [B, L, d] behind a window, and the last window."""
    if window is None:
        window = x.new_zeros(x.shape[0], reach(conv), x.shape[2])
    padded = torch.cat((window.to(x.dtype), x), dim=1)
    unused = window.shape[1] - reach(conv)
    return _valid(padded[:, unused:], conv), padded[:, x.shape[1] :]


def convolved_silu(x: Tensor, window: Tensor | None, conv: nn.Conv1d) -> tuple[Tensor, Tensor]:
    """silu of it, and the last window: in one pass over x, where `mamba_operators` serve."""
    if window is None:
        window = x.new_zeros(x.shape[0], reach(conv), x.shape[2])
    window = window.to(x.dtype)
    used = window[:, window.shape[1] - reach(conv) :]
    bias = None if conv.bias is None else conv.bias.float()
    y = mamba_operators.causal_conv(x, used, taps(conv, torch.float32).contiguous(), bias, True)
    newest = x[:, max(0, x.shape[1] - window.shape[1]) :]
    return y, torch.cat((window[:, newest.shape[1] :], newest), dim=1)


def convolved_packed(
    x: Tensor, window: Tensor | None, conv: nn.Conv1d, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """As `convolved` for N sequences packed in x [1, L, d], with windows [N, K - 1, d].

    Each sequence is laid out behind its own window, and all convolved as one.
    """
    (_, L, d), N, K = x.shape, cu_seqlens.shape[0] - 1, reach(conv) + 1
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        cu_seqlens_values(cu_seqlens, L)
    cu_seqlens = cu_seqlens.long()
    if window is None:
        window = x.new_zeros(N, K - 1, d)
    steps, rows = torch.arange(L, device=x.device), torch.arange(N, device=x.device)
    sequence = torch.searchsorted(cu_seqlens[1:], steps, right=True)
    outputs = steps + sequence * (K - 1)  # where a step's own window begins
    offset = torch.arange(K - 1, device=x.device)
    windows = (cu_seqlens[:-1] + rows * (K - 1))[:, None] + offset  # [N, K - 1]
    lasts = (cu_seqlens[1:] + rows * (K - 1))[:, None] + offset
    where = torch.cat((windows.flatten(), outputs + K - 1))
    source = torch.cat((window.to(x.dtype).flatten(0, 1), x[0]))
    padded = torch.empty_like(source).index_copy(0, where, source)[None]
    return _valid(padded, conv)[:, outputs], padded[0, lasts]


def _valid(padded: Tensor, conv: nn.Conv1d) -> Tensor:
    """y_t = bias + sum_k taps_k padded_{t+k}: [B, L, d] of [B, L + K - 1, d]."""
    if padded.device.type != "cpu" or padded.dtype in (torch.bfloat16, torch.float16):
        weight, bias = conv.weight.to(padded.dtype), conv.bias
        bias = None if bias is None else bias.to(padded.dtype)
        return F.conv1d(padded.mT, weight, bias, groups=weight.shape[0]).mT
    # On CPU a product for each tap is several times faster than conv1d.
    L = padded.shape[1] - reach(conv)
    oldest, *newer = taps(conv, padded.dtype)
    first = padded[:, :L]
    y = first * oldest if conv.bias is None else torch.addcmul(conv.bias, first, oldest)
    for k, tap in enumerate(newer, 1):
        y.addcmul_(padded[:, k : k + L], tap)
    return y


def convolved_step(
    x: Tensor, window: Tensor, rows: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """For one step x [B, 1, d]: its convolution by `rows` (`taps`), and the last K inputs."""
    inputs = torch.cat((window[:, window.shape[1] - len(rows) + 1 :], x), dim=1)
    y = (inputs * rows).sum(1, keepdim=True)  # in the dtype of rows, or wider
    return (y if bias is None else y.add_(bias)).to(x.dtype), inputs


def taps(conv: nn.Conv1d, dtype: torch.dtype) -> Tensor:
    """[K, d]; the last one meets the newest input."""
    return conv.weight[:, 0].T.to(dtype)


def reach(conv: nn.Conv1d) -> int:
    """K - 1: how many inputs before its own an output depends on."""
    return conv.weight.shape[2] - 1
