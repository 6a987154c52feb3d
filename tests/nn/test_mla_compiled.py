"""A compiled kk.nn.MultiheadLatentAttention that generates token by token."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

import kexue_kernels as kk
from kexue_kernels.nn.mla import DecodeStep, SelectedSequences
from tests.nn.test_mla import HIDDEN, check_near, empty_cache, make


class Counting:
    """A backend of torch.compile that counts the graphs it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        self.graphs += 1
        return graph.forward


def selected(layer: kk.nn.MultiheadLatentAttention, num_blocks: int = 60) -> SelectedSequences:
    cache, ids = empty_cache(layer, 2, num_blocks)
    return cache.select(ids)


def test_no_graph_for_each_token() -> None:
    """One for a prefill, one for a token, one for any width of block tables: of all layers."""
    layers, counting = [make(seed=seed) for seed in range(2)], Counting()

    def model(x: Tensor, caches: list[SelectedSequences]) -> Tensor:
        for layer, cache in zip(layers, caches, strict=True):
            x = layer(x, cache)
        return x

    compiled, graphs = torch.compile(model, backend=counting), []
    for _ in range(2):  # of other sequences
        caches, same = ([selected(layer) for layer in layers] for _ in range(2))
        with torch.no_grad():
            for T in (5, *[1] * 20):
                x = torch.randn(2, T, HIDDEN)
                check_near(compiled(x, caches), model(x, same))
        graphs.append(counting.graphs)
    assert graphs[0] == graphs[1] <= 4


def test_a_decode_step_is_one_graph() -> None:
    layer, counting = make(), Counting()
    compiled = torch.compile(layer, fullgraph=True, backend=counting)
    steps = [DecodeStep(selected(layer)) for _ in range(2)]
    with torch.no_grad():
        for _ in range(10):
            x = torch.randn(2, 1, HIDDEN)
            for step in steps:
                step.advance()
            check_near(compiled(x, steps[0]), layer(x, steps[1]))
        assert counting.graphs == 1
        with pytest.raises(torch._dynamo.exc.Unsupported, match="DecodeStep the layer is one"):
            compiled(x, selected(layer))


def test_a_full_cache_changes_nothing() -> None:
    layer = make()
    compiled, batch = torch.compile(layer, backend="eager"), selected(layer, num_blocks=3)
    with torch.no_grad():
        compiled(torch.randn(2, 3, HIDDEN), batch)
        before = batch.cache.kv_cache.clone()
        for _ in range(2):
            with pytest.raises(kk.CacheFullError):
                compiled(torch.randn(2, 3, HIDDEN), batch)
    assert torch.equal(batch.cache.kv_cache, before)
    assert batch.cache_seqlens().tolist() == [3, 3]


def test_dynamo_is_imported_for_compiled_layers_alone() -> None:
    program = """
import sys, torch, kexue_kernels as kk
layer = kk.nn.MultiheadLatentAttention(
    8, 1, q_lora_rank=None, kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4
)
cache = kk.nn.PagedLatentCache(1, 4, 4, 4)
with torch.no_grad():
    layer(torch.randn(1, 2, 8), cache.select([cache.allocate()]))
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
