"""The cases of mla_decode, most important first: dc = 512, dr = 64, pages of 64 tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kexue_kernels.benchmarks import mla_packages
from kexue_kernels.benchmarks import mla_peers as peers
from kexue_kernels.benchmarks.case import Case, Sweep
from kexue_kernels.benchmarks.goals import Goal, copy_share, faster, matrix_share, microseconds
from kexue_kernels.benchmarks.roof import short

DC, DR, DK, PAGE = peers.DC, 64, 128, 64
WIDTH = DC + DR
HOPPER_ROWS = 64  # queries of a sequence from where on the kernel for sm_90 takes part
COUNTED = "bytes: the cache's rows read once; FLOPs: 2 (576 + 512) for each query and row"


def cases(device: torch.device) -> list[Case]:
    found = _gpu_cases(device) if device.type == "cuda" else _cpu_cases(device)
    return sorted(found, key=lambda case: case.priority)


def case(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    Tq: int = 1,
    whole_step: bool = False,
    goals: Sequence[Goal] = (),
    priority: int = 1,
    quick: bool = False,
    sweep: bool = False,  # a point of a curve against the length
) -> Case:
    """B sequences of L tokens, H heads; with the projections where it is a `whole_step`."""
    B, L, H = shape
    op = "mla step" if whole_step else "mla_decode"
    rows, queries = B * L, B * Tq * H
    backends = ["triton"] if device.type == "cuda" else ["cpu"]
    if backends == ["triton"] and Tq * H >= HOPPER_ROWS:
        backends += ["cuda"]
    own = [peers.ours(backend, whole_step) for backend in backends]
    others = [peers.expanded()] if whole_step else [peers.sdpa(), peers.compiled()]
    if device.type == "cuda" and not whole_step:
        others += [mla_packages.flag_gems(Tq), mla_packages.flashinfer(Tq)]
    kind = f"{op} {short(dtype)} B = {B}, H = {H}" + f", Tq = {Tq}" * (Tq > 1)
    return Case(
        name=f"{kind}, {L} tokens",
        op=op,
        direction="forward",
        shape={"B": B, "L": L, "H": H, "Tq": Tq},
        dtype=dtype,
        bytes=rows * WIDTH * dtype.itemsize,
        flops=2 * Tq * H * rows * (WIDTH + DC),
        counted=COUNTED,
        result_bytes=queries * (DK if whole_step else DC) * dtype.itemsize,
        output_shape=(B, Tq, H, DK if whole_step else DC),
        make=lambda device: draw(B, L, H, Tq, dtype, device, whole_step),
        reference=peers.reference(whole_step),
        contestants=(*own, peers.absorbed(whole_step), *others),
        goals=tuple(goals),
        priority=priority,
        quick=quick,
        sweep=Sweep(kind, "L", L) if sweep else None,
    )


def draw(
    B: int, L: int, H: int, Tq: int, dtype: torch.dtype, device: torch.device, whole_step: bool
) -> dict[str, Tensor]:
    """Full pages in a random order."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    pages = B * L // PAGE
    order = torch.randperm(pages, generator=generator, device=device)
    cache = {
        "kv_cache": normal(pages, PAGE, WIDTH),
        "block_table": order.int().view(B, L // PAGE),
        "cache_seqlens": torch.full((B,), L, dtype=torch.int32, device=device),
    }
    if not whole_step:
        return {"q": normal(B, Tq, H, WIDTH), **cache}
    return {
        "q_nope": normal(B, Tq, H, DK),
        "q_rope": normal(B, Tq, H, DR),
        "w_uk": normal(H, DK, DC) * DC**-0.5,
        "w_uv": normal(H, DK, DC) * DC**-0.5,
        **cache,
    }


def _cpu_cases(device: torch.device) -> list[Case]:
    f32, bf16 = torch.float32, torch.bfloat16
    decodes = (faster(peers.ABSORBED, 1.5), copy_share(0.3))
    return [
        case((4, 4096, 16), f32, device, goals=decodes, priority=0, sweep=True),
        case(
            (4, 4096, 16), f32, device,
            whole_step=True, goals=(faster(peers.EXPANDED, 60),), priority=0,
        ),
        case((4, 256, 16), f32, device, quick=True, sweep=True),
        case((4, 4096, 16), bf16, device, priority=2),
        case((1, 16384, 16), f32, device, priority=2),
    ]  # fmt: skip


def _gpu_cases(device: torch.device) -> list[Case]:
    bf16 = torch.bfloat16
    rates = matrix_share(0.6, "triton"), matrix_share(0.8, "cuda")
    return [
        case((128, 8192, 16), bf16, device, goals=(copy_share(0.85),), quick=True, priority=0),
        case((128, 8192, 128), bf16, device, goals=rates, priority=0),
        case((1, 65536, 16), bf16, device, goals=(microseconds(60),), priority=0, sweep=True),
        *(case((128, 8192, 16), bf16, device, Tq=Tq) for Tq in (2, 4)),
        *(case((1, L, 16), bf16, device, sweep=True, priority=2) for L in (1024, 8192)),
        case((8, 4096, 16), bf16, device, whole_step=True, priority=2),
    ]
