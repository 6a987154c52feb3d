"""The cases of mla_attention: dk = 128, dr = 64, dv = 128, dc = 512, causal, batch of 1."""

import torch
from torch import Tensor

from kexue_kernels.benchmarks import mla_attention_peers as peers
from kexue_kernels.benchmarks.case import Case, Contestant, Direction, Sweep
from kexue_kernels.benchmarks.goals import Goal, faster, leaner, matrix_share
from kexue_kernels.benchmarks.results import CaseResult, Measurement
from kexue_kernels.benchmarks.roof import short

DK, DR, DV, DC = 128, 64, 128, 512
BOTH: Direction = "forward+backward"

COUNTED = (
    "bytes: inputs, output, and in the backward the output, its gradient and the gradients, each "
    "once; FLOPs: forward the keys and values, and half of all scores and of their products with "
    "values; backward two products for each of the forward's, and the scores again"
)


def cases(device: torch.device) -> list[Case]:
    return _gpu_cases() if device.type == "cuda" else _cpu_cases()


def inputs_bytes(T: int, H: int, itemsize: int) -> int:
    queries, latents, weights = T * H * (DK + DR), T * (DC + DR), H * (DK + DV) * DC
    return itemsize * (queries + latents + weights)


def output_bytes(T: int, H: int, itemsize: int) -> int:
    return itemsize * T * H * DV


def bytes_moved(T: int, H: int, itemsize: int, direction: Direction) -> int:
    inputs, output = inputs_bytes(T, H, itemsize), output_bytes(T, H, itemsize)
    forward = inputs + output
    return forward if direction == "forward" else forward + 2 * inputs + 2 * output


def flops(T: int, H: int, direction: Direction) -> int:
    expansion = 2 * T * DC * H * (DK + DV)
    scores, values = T * T * H * (DK + DR), T * T * H * DV
    forward = expansion + scores + values
    return forward if direction == "forward" else 3 * forward + scores


def case(
    T: int,
    H: int,
    dtype: torch.dtype,
    direction: Direction,
    *,
    on: list[Contestant],
    goals: tuple[Goal, ...] = (),
    priority: int = 1,
    quick: bool = False,
    sweep: bool = False,  # a point of a curve against T
) -> Case:
    size = dtype.itemsize
    kind = f"mla_attention {direction} {short(dtype)} H = {H}"
    gradients = 0 if direction == "forward" else inputs_bytes(T, H, size)
    return Case(
        name=f"{kind}, T = {T}",
        op="mla_attention",
        direction=direction,
        shape={"B": 1, "T": T, "H": H},
        dtype=dtype,
        bytes=bytes_moved(T, H, size, direction),
        flops=flops(T, H, direction),
        counted=COUNTED,
        result_bytes=output_bytes(T, H, size) + gradients,
        output_shape=(1, T, H, DV),
        make=lambda device: draw(T, H, dtype, device),
        reference=peers.reference(),
        contestants=tuple(on),
        steps=40 * H * (1 + T // peers.BLOCK),
        goals=goals,
        priority=priority,
        quick=quick,
        sweep=Sweep(kind, "L", T) if sweep else None,
    )


def draw(T: int, H: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Scores of a standard deviation of about 1."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    return {
        "q_nope": normal(1, T, H, DK).to(dtype),
        "q_rope": normal(1, T, H, DR).to(dtype),
        "kv_latent": normal(1, T, DC).to(dtype),
        "k_rope": normal(1, T, DR).to(dtype),
        "w_uk": (normal(H, DK, DC) * DC**-0.5).to(dtype),
        "w_uv": (normal(H, DV, DC) * DC**-0.5).to(dtype),
    }


def spared(others: tuple[str, ...], times: float) -> Goal:
    """Memory beyond outputs and gradients, beside the least that one of others takes."""

    def measure(result: CaseResult, best: Measurement) -> float | None:
        peaks = [m.peak_bytes for m in result.contestants if m.name in others and m.peak_bytes]
        if not peaks or best.peak_bytes is None:
            return None
        return (best.peak_bytes - result.result_bytes) / (min(peaks) - result.result_bytes)

    text = f"beyond results at most {times:g}x of expand + SDPA"
    return Goal(text, measure, times, at_least=False)


def beyond_results(gigabytes: float) -> Goal:
    def measure(result: CaseResult, best: Measurement) -> float | None:
        if best.peak_bytes is None:
            return None
        return (best.peak_bytes - result.result_bytes) / 1e9

    return Goal(f"beyond results at most {gigabytes:g} GB", measure, gigabytes, at_least=False)


def _peers(device: torch.device) -> list[Contestant]:
    backend = "triton" if device.type == "cuda" else "cpu"
    others = [peers.sdpa(name) for name in peers.sdpa_backends(device)]
    return [peers.ours(backend), *others, peers.eager(), peers.compiled()]


def _cpu_cases() -> list[Case]:
    f32 = torch.float32
    on = _peers(torch.device("cpu"))
    goals = (faster(peers.EAGER, 1.2), leaner(peers.EAGER, 0.333))
    return [
        case(1024, 16, f32, BOTH, on=on, goals=goals, priority=0, sweep=True),
        case(1024, 16, f32, "forward", on=on),
        case(256, 16, f32, BOTH, on=on, quick=True, sweep=True),
        *(case(T, 16, f32, BOTH, on=on, priority=2, sweep=True) for T in (512, 2048)),
        case(1024, 16, torch.bfloat16, BOTH, on=on, priority=3),
    ]


def _gpu_cases() -> list[Case]:
    bf16 = torch.bfloat16
    device = torch.device("cuda")
    on = _peers(device)
    flash = tuple(peers.sdpa_name(name) for name in peers.sdpa_backends(device))
    ahead = tuple(faster(name, 1) for name in flash)
    lean = [peers.ours("triton"), *(peers.sdpa(name) for name in peers.sdpa_backends(device))]
    return [
        case(8192, 128, bf16, "forward", on=on, goals=(matrix_share(0.55),), priority=0),
        case(
            8192, 128, bf16, BOTH, on=on, goals=(*ahead, spared(flash, 0.25)), priority=0,
            sweep=True,
        ),
        case(65536, 128, bf16, BOTH, on=lean, goals=(beyond_results(1.5),), sweep=True),
        case(2048, 16, bf16, BOTH, on=on, quick=True),
        *(
            case(T, 128, bf16, BOTH, on=on, priority=2, sweep=True)
            for T in (1024, 2048, 4096)
        ),
        *(case(T, 128, bf16, BOTH, on=lean, priority=2, sweep=True) for T in (16384, 32768)),
    ]  # fmt: skip
