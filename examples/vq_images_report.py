"""What vq_images.py shows and writes: a table, curves, pictures side by side, numbers."""

from __future__ import annotations

import importlib.util
import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from vq_images_model import CODES, Autoencoder, Photos

import kexue_kernels as kk

if TYPE_CHECKING:
    from matplotlib.figure import Figure

console = Console()


class Point(NamedTuple):
    """Of the held-out columns, after so many steps."""

    step: int
    decibel: float
    usage: float
    perplexity: float


class Run(NamedTuple):
    """One method's training."""

    model: Autoencoder
    points: list[Point]
    seconds: float


def show(runs: dict[str, Run]) -> None:
    table = Table("method", "PSNR, dB", "codes in use", "perplexity", "seconds")
    for name, run in runs.items():
        last = run.points[-1]
        table.add_row(
            name,
            f"{last.decibel:.2f}",
            f"{last.usage:.1%} of {CODES}",
            f"{last.perplexity:.1f}",
            f"{run.seconds:.0f}",
        )
    console.print(table)
    console.print(verdict(runs))


def verdict(runs: dict[str, Run]) -> str:
    """Whether what is known of these methods shows here."""
    plain = runs["straight through"].points[-1].usage
    others = {name: run.points[-1].usage for name, run in runs.items()}
    del others["straight through"]
    raised = [name for name, usage in others.items() if usage > plain]
    missed = [name for name in others if name not in raised]
    parts = [f"{name} raised the usage of the codebook" for name in raised]
    parts += [f"{name} did not raise the usage of the codebook in this run" for name in missed]
    return "; ".join(parts)


def write(runs: dict[str, Run], photos: Photos, steps: int, seed: int, out: Path) -> None:
    """vq_images.json and, where there is matplotlib, two pictures in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    numbers = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "kexue_kernels": kk.__version__},
        "threads": torch.get_num_threads(),
        "backends": {name: status._asdict() for name, status in kk.backends().items()},
        "steps": steps,
        "seed": seed,
        "codes": CODES,
        "runs": {
            name: {"seconds": run.seconds, "points": [point._asdict() for point in run.points]}
            for name, run in runs.items()
        },
        "verdict": verdict(runs),
    }
    (out / "vq_images.json").write_text(json.dumps(numbers, indent=2) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        console.print("no pictures: matplotlib is not installed")
    else:
        curves(runs).savefig(out / "vq_images_usage.png", dpi=120)
        pictures(runs, photos).savefig(out / "vq_images.png", dpi=120)
    console.print(f"written to the folder {out}", markup=False)


def curves(runs: dict[str, Run]) -> Figure:
    """Usage, perplexity and reconstruction over training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = (("usage", "share of codes in use"), ("perplexity", "perplexity"), ("decibel", "dB"))
    for axes, (field, label) in zip(figure.subplots(1, 3), panels, strict=True):
        for name, run in runs.items():
            steps = [point.step for point in run.points]
            axes.plot(steps, [getattr(p, field) for p in run.points], marker="o", label=name)
        axes.set(xlabel="training steps", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


@torch.no_grad()
def pictures(runs: dict[str, Run], photos: Photos) -> Figure:
    """The held-out columns of both photographs, as they are and as each method makes them."""
    from matplotlib.figure import Figure

    made = {"original": photos.held_out}
    made |= {name: run.model.eval()(photos.held_out)[0] for name, run in runs.items()}
    figure = Figure(figsize=(3 * len(made), 14), layout="constrained")
    for row, panels in enumerate(figure.subplots(2, len(made))):
        for axes, (name, images) in zip(panels, made.items(), strict=True):
            image = (images[row].clamp(-1, 1) + 1) / 2
            axes.imshow(image.permute(1, 2, 0).numpy())
            axes.set_title(name)
            axes.axis("off")
    return figure
