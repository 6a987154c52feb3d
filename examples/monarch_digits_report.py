"""What monarch_digits.py shows and writes: a table, a plot, numbers."""

from __future__ import annotations

import importlib.util
import json
import platform
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

import kexue_kernels as kk

if TYPE_CHECKING:
    from matplotlib.figure import Figure

console = Console()
LABELS = {
    "dense": "dense, of several widths",
    "scratch": "Monarch, from scratch",
    "projected": "Monarch, projected",
    "finetuned": "Monarch, projected and finetuned",
}


class Result(NamedTuple):
    """One model of one seed."""

    kind: str  # a key of LABELS
    size: int  # the width of a dense perceptron, the blocks of a Monarch
    parameters: int
    flops: int  # of the matrix products for one image
    relative_error: float | None  # of the projection
    accuracy: float


class Summary(NamedTuple):
    """One model over all seeds."""

    kind: str
    size: int
    parameters: int
    flops: int
    relative_error: float | None
    accuracy: float
    lowest: float
    highest: float


def summaries(results: list[Result]) -> list[Summary]:
    """Means over seeds, by kind and size."""
    groups: dict[tuple[str, int], list[Result]] = {}
    order = list(LABELS)
    for result in sorted(results, key=lambda r: (order.index(r.kind), r.size)):
        groups.setdefault(result[:2], []).append(result)
    found = []
    for group in groups.values():
        right = [result.accuracy for result in group]
        errors = [result.relative_error for result in group if result.relative_error is not None]
        error = statistics.mean(errors) if errors else None
        found.append(Summary(*group[0][:4], error, statistics.mean(right), min(right), max(right)))
    return found


def show(results: list[Result]) -> None:
    table = Table("model")
    for title in ("size", "parameters", "FLOPs", "error", "accuracy", "range"):
        table.add_column(title, justify="right")
    for row in summaries(results):
        table.add_row(
            row.kind,
            str(row.size),
            f"{row.parameters / 1e3:,.0f} k",
            f"{row.flops / 1e3:,.0f} k",
            "" if row.relative_error is None else f"{row.relative_error:.3f}",
            f"{row.accuracy:.2%}",
            f"{100 * row.lowest:.2f}-{100 * row.highest:.2f}",
        )
    console.print(table)
    console.print("size: width of a dense model, blocks of a Monarch; error: of the projection")


def write(results: list[Result], epochs: int, seeds: int, seconds: float, out: Path) -> None:
    """monarch_digits.json and, where there is matplotlib, a plot in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    numbers = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "kexue_kernels": kk.__version__},
        "threads": torch.get_num_threads(),
        "epochs": epochs,
        "seeds": seeds,
        "seconds": seconds,
        "results": [row._asdict() for row in results],
    }
    (out / "monarch_digits.json").write_text(json.dumps(numbers, indent=2) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        console.print("no plot: matplotlib is not installed")
    else:
        plot(summaries(results)).savefig(out / "monarch_digits.png", dpi=100)
    console.print(f"{seconds:.0f} seconds; written to the folder {out}", markup=False)


def plot(rows: list[Summary]) -> Figure:
    """Accuracy against parameters and FLOPs; bars from the worst seed to the best."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = (("parameters", "parameters"), ("flops", "FLOPs of an image"))
    for axes, (field, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for kind in dict.fromkeys(row.kind for row in rows):
            line = [row for row in rows if row.kind == kind]
            spread = [
                [100 * (row.accuracy - row.lowest) for row in line],
                [100 * (row.highest - row.accuracy) for row in line],
            ]
            axes.errorbar(
                [getattr(row, field) for row in line],
                [100 * row.accuracy for row in line],
                yerr=spread,
                marker="o",
                capsize=3,
                label=LABELS[kind],
            )
        axes.set(xscale="log", xlabel=label, ylabel="held-out accuracy, %")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure
