"""kk.nn.MultiheadLatentAttention with its heads on two ranks: as on one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed
from torch.testing import assert_close

from kexue_kernels.nn.mla import MultiheadLatentAttention, PagedLatentCache
from tests.nn.parts import gradients

HIDDEN, HEADS, T, STEPS = 20, 4, 9, 4
OPTIONS = [{"q_lora_rank": 10, "bias": True}, {"q_lora_rank": None}]
Results = list[dict[str, Tensor]]


def make(options: dict[str, object], group: object = None) -> MultiheadLatentAttention:
    torch.manual_seed(0)
    return MultiheadLatentAttention(
        HIDDEN, HEADS, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6,
        process_group=group, dtype=torch.float64, **options,
    )  # fmt: skip


def run(layer: MultiheadLatentAttention) -> dict[str, Tensor]:
    """Outputs, gradients and outputs of prefill and steps."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, T, HIDDEN, generator=g, dtype=torch.float64).requires_grad_()
    y = layer(x)
    names = ["x", *(name for name, _ in layer.named_parameters())]
    grads = gradients([y], [x, *layer.parameters()])
    cache = PagedLatentCache(10, 4, 12, 4, dtype=torch.float64)
    batch = cache.select([cache.allocate(), cache.allocate()])
    with torch.no_grad():
        decoded = [layer(part, batch) for part in x.split([T - STEPS, *[1] * STEPS], 1)]
    return {
        "y": y.detach(),
        "decoded": torch.cat(decoded, 1),
        **dict(zip(names, grads, strict=True)),
    }


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    found, calls, all_reduce = [], 0, distributed.all_reduce

    def counted(*args, **options):
        nonlocal calls
        calls += 1
        return all_reduce(*args, **options)

    distributed.all_reduce = counted
    for options in OPTIONS:
        layer = make(options, distributed.group.WORLD)
        started = layer.shard(make(options).state_dict(), rank, 2)
        assert all(torch.equal(started[k], v) for k, v in layer.state_dict().items())
        layer.load_state_dict(started)
        assert f"{HEADS} heads, {HEADS // 2} here" in repr(layer)
        calls = 0
        found.append(run(layer))
        assert calls == 1 + 1 + 1 + STEPS  # forward, backward, prefill and each step
    with pytest.raises(ValueError, match=r"num_heads: expected a multiple of .* 2 ranks, got 3"):
        MultiheadLatentAttention(
            8, 3, q_lora_rank=None, kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=4,
            v_head_dim=4, process_group=distributed.group.WORLD,
        )  # fmt: skip
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_are_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    ranks: list[Results] = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for options, *parts in zip(OPTIONS, *ranks, strict=True):
        layer = make(options)
        whole = run(layer)
        for rank, part in enumerate(parts):
            expected = layer.shard(whole, rank, 2)  # gradients are cut as their parameters are
            assert part.keys() == expected.keys()
            for name, value in expected.items():
                assert_close(part[name], value, rtol=1e-11, atol=1e-12, msg=name)
        for name in ("y", "decoded", "x", "kv_a_layernorm.weight"):
            assert torch.equal(parts[0][name], parts[1][name]), name


def test_shards_of_a_whole_model() -> None:
    state = {f"model.layers.0.self_attn.{k}": v for k, v in make(OPTIONS[0]).state_dict().items()}
    state["model.layers.0.mlp.up_proj.weight"] = torch.randn(6, 4)
    parts = [MultiheadLatentAttention.shard(state, rank, 2) for rank in range(2)]
    cut = {"q_b_proj": 0, "kv_b_proj": 0, "o_proj": 1}
    for name, value in state.items():
        axis = cut.get(name.split(".")[-2]) if name.endswith("weight") else None
        if axis is None:
            assert parts[0][name] is value
        else:
            assert torch.equal(torch.cat([part[name] for part in parts], axis), value)
            assert parts[1][name].untyped_storage().nbytes() == value.nbytes // 2
