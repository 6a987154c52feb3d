"""kk.nn.MultiheadLatentAttention on a GPU: values and gradients, and a captured step."""

import copy

import pytest
import torch
from torch import Tensor

import kexue_kernels as kk
from kexue_kernels.nn.mla import DecodeStep
from tests.nn.parts import check_as_near, gradients
from tests.nn.test_mla import YARN, empty_cache

pytestmark = pytest.mark.gpu

HIDDEN, T = 256, 300


def make(dtype: torch.dtype) -> kk.nn.MultiheadLatentAttention:
    torch.manual_seed(0)
    return kk.nn.MultiheadLatentAttention(
        HIDDEN, 16, q_lora_rank=96, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32,
        v_head_dim=64, rope_scaling=YARN, dtype=dtype,
    )  # fmt: skip


def run(layer: kk.nn.MultiheadLatentAttention, x: Tensor) -> list[Tensor]:
    """y, its gradients, and what prefill and steps give."""
    x = x.detach().requires_grad_()
    y = layer(x)
    grads = gradients([y.cpu()], [x, *layer.parameters()])
    cache, ids = empty_cache(layer, 2, num_blocks=2 * T, block_size=16)
    with torch.no_grad():
        parts = [layer(part, cache.select(ids)) for part in x.split([T - 40, 1, 1, 38], 1)]
    return [value.detach().cpu() for value in (y, *grads, torch.cat(parts, 1))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients(dtype: torch.dtype) -> None:
    layer = make(dtype)
    x = torch.randn(2, T, HIDDEN).to(dtype)
    exact = run(copy.deepcopy(layer).double(), x.double())
    plain = run(layer, x)
    check_as_near(run(layer.cuda(), x.cuda()), plain, exact)


def test_a_captured_step() -> None:
    """The graph's outputs are bitwise those of calls without it."""
    layer = make(torch.bfloat16).cuda().requires_grad_(False)
    x = torch.randn(2, T, HIDDEN).bfloat16().cuda()
    batches = []
    for _ in range(2):
        cache, ids = empty_cache(layer, 2, num_blocks=64, block_size=16)
        layer(x[:, : T - 30], cache.select(ids))
        batches.append(cache.select(ids))
    captured, plain = (DecodeStep(batch, max_blocks=20) for batch in batches)
    given = x[:, -1:].clone()
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        layer(given, captured)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(given, captured)
    for t in range(T - 30, T):
        given.copy_(x[:, t : t + 1])
        captured.advance()
        graph.replay()
        plain.advance()
        assert torch.equal(y, layer(given, plain))
    assert torch.equal(batches[0].cache_seqlens(), batches[1].cache_seqlens())
