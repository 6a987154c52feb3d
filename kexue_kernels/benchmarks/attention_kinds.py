"""Decoding by multi-head, grouped-query, multi-query and latent attention, at one model width.

Every kind has H query heads of 128. What differs is what a token leaves in the cache: keys and
values of H, 8, 4 or one head, or a latent and a rotated key for all. A step is one query token of
each of B sequences against its cache; latent attention's includes the absorbed projections.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from kexue_kernels.benchmarks import mla_peers
from kexue_kernels.benchmarks.case import Case, Contestant, Sweep
from kexue_kernels.benchmarks.mla_decode import DC, DK, WIDTH, draw
from kexue_kernels.benchmarks.roof import short


def cases(device: torch.device) -> list[Case]:
    if device.type == "cuda":
        B, H, dtype, backend = 16, 128, torch.bfloat16, "triton"
    else:
        B, H, dtype, backend = 4, 16, torch.float32, "cpu"
    kinds = [partial(heads, G) for G in (H, 8, 4, 1)] + [partial(latent, backend)]
    return [kind((B, L, H), dtype) for L in (1024, 4096, 16384) for kind in kinds]


def kind_of(G: int, H: int) -> str:
    return {H: "MHA", 1: "MQA"}.get(G, f"GQA, {G} groups")


def heads(G: int, shape: tuple[int, int, int], dtype: torch.dtype) -> Case:
    """Keys and values of G heads, each for H / G query heads."""
    H = shape[2]
    name, cached = kind_of(G, H), 2 * G * DK * dtype.itemsize
    return _case(
        name,
        shape,
        dtype,
        cached=cached,
        products=2 * DK,
        make=lambda device: _draw_heads(shape, G, dtype, device),
        reference=Contestant("torch einsum", lambda: by_einsum),
        contestant=Contestant(_label(name, cached), lambda: by_sdpa, approximate=True),
    )


def latent(backend: str, shape: tuple[int, int, int], dtype: torch.dtype) -> Case:
    """A latent and one rotated key a token, for all heads."""
    B, L, H = shape
    cached = WIDTH * dtype.itemsize
    ours = mla_peers.ours(backend, whole_step=True)
    return _case(
        "MLA",
        shape,
        dtype,
        cached=cached,
        products=WIDTH + DC,
        make=lambda device: draw(B, L, H, 1, dtype, device, whole_step=True),
        reference=mla_peers.reference(whole_step=True),
        contestant=Contestant(
            f"{_label('MLA', cached)}, {ours.name}", ours.load, ours=True, unfit=ours.unfit
        ),
    )


def _label(kind: str, cached: int) -> str:
    return f"{kind}, {cached / 1024:g} KiB a token"


def _case(
    kind: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    cached: int,
    products: int,
    make: Callable[[torch.device], dict[str, Tensor]],
    reference: Contestant,
    contestant: Contestant,
) -> Case:
    B, L, H = shape
    title = f"decoding {short(dtype)} B = {B}, H = {H}"
    return Case(
        name=f"{title} {kind}, {L} tokens",
        op="attention_kinds",
        direction="forward",
        shape={"B": B, "L": L, "H": H},
        dtype=dtype,
        bytes=B * L * cached,
        flops=2 * B * L * H * products,
        counted="bytes: the cache read once; FLOPs: 2 for each product of a query head with a row",
        result_bytes=B * H * DK * dtype.itemsize,
        output_shape=(B, 1, H, DK),
        make=make,
        reference=reference,
        contestants=(contestant,),
        priority=2,
        sweep=Sweep(title, "L", L, made="tokens", per_call=B),
    )


def _draw_heads(
    shape: tuple[int, int, int], G: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """q [B, H, 1, 128], k and v [B, G, L, 128]."""
    B, L, H = shape
    generator = torch.Generator(device).manual_seed(0)
    sizes = {"q": (B, H, 1, DK), "k": (B, G, L, DK), "v": (B, G, L, DK)}
    return {
        name: torch.randn(size, generator=generator, device=device).to(dtype)
        for name, size in sizes.items()
    }


def by_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, 1, H, 128]."""
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return out.transpose(1, 2)


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition; query head h reads the keys of head h // (H / G)."""
    grouped = q.unflatten(1, (k.shape[1], -1))  # B G H/G 1 128
    weights = (torch.einsum("bghqd,bgld->bghql", grouped, k) * DK**-0.5).softmax(-1)
    return torch.einsum("bghql,bgld->bghqd", weights, v).flatten(1, 2).transpose(1, 2)
