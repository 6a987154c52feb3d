"""Heads shared out over the ranks of a process group, and the two sums that this takes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable

from kexue_kernels import options

SPLIT_AXIS = {"q_proj.weight": 0, "q_b_proj.weight": 0, "kv_b_proj.weight": 0, "o_proj.weight": 1}


def ranks(process_group: object, num_heads: int) -> tuple[int, int]:
    """This rank and how many there are; (0, 1) for None."""
    if process_group is None:
        return 0, 1
    if not isinstance(process_group, distributed.ProcessGroup):
        kind = type(process_group).__name__
        raise TypeError(f"process_group: expected a ProcessGroup of this rank, got {kind}")
    rank, world = process_group.rank(), process_group.size()
    if num_heads % world:
        raise ValueError(
            f"num_heads: expected a multiple of the process group's {world} ranks, got {num_heads}"
        )
    return rank, world


def shard(state_dict: Mapping[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    """What rank `rank` of `world` loads of an unsharded module's state.

    Each rank gets the rows of `q_proj` or `q_b_proj` and of `kv_b_proj`, and the columns of
    `o_proj`, of its heads, copied; all else as it is. Names may have a prefix, as in the state of
    a whole model.
    """
    options.integer("world", world)
    options.integer("rank", rank, 0)
    if rank >= world:
        raise ValueError(f"rank: expected less than world = {world}, got {rank}")
    return {name: _part(name, value, rank, world) for name, value in state_dict.items()}


def _part(name: str, value: Tensor, rank: int, world: int) -> Tensor:
    axis = SPLIT_AXIS.get(".".join(name.split(".")[-2:]))
    if axis is None or world == 1:
        return value
    if value.shape[axis] % world:
        raise ValueError(
            f"{name}: expected a multiple of world = {world} along axis {axis}, "
            f"got {list(value.shape)}"
        )
    return value.detach().chunk(world, axis)[rank].clone()


def keep_own_heads(module: nn.Module, rank: int, world: int) -> None:
    """Replace the linear layers' weights of all heads by those of this rank's."""
    own = shard(module.state_dict(), rank, world)
    for name, axis in SPLIT_AXIS.items():
        linear = getattr(module, name.removesuffix(".weight"), None)
        if linear is not None:
            linear.weight = nn.Parameter(own[name])
            size = "out_features" if axis == 0 else "in_features"
            setattr(linear, size, own[name].shape[axis])


def copied(group: distributed.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
    """What all ranks hold alike, on its way to each one's heads: gradients sum over the ranks."""
    return _Copied.apply(group, *tensors)


def summed(group: distributed.ProcessGroup, x: Tensor) -> Tensor:
    """The sum of all ranks' x, which each goes on with: its gradient is everyone's already."""
    return _Summed.apply(group, x)


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: distributed.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        joined = torch.cat([g.reshape(-1) for g in grads])  # one call for all
        distributed.all_reduce(joined, group=ctx.group)
        parts = joined.split([g.numel() for g in grads])
        return None, *(part.view_as(g).to(g.dtype) for part, g in zip(parts, grads, strict=True))


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, group: distributed.ProcessGroup, x: Tensor) -> Tensor:
        x = x.clone()
        distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    @once_differentiable
    def backward(_ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad
