"""What attention_chars.py prints and writes: a table, a plot, numbers."""

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


class Result(NamedTuple):
    """One model of one seed."""

    kind: str
    seed: int
    parameters: int
    cache_bytes: int  # that a token leaves in all layers, float32
    bits: float  # per held-out character


def bits_of(results: list[Result]) -> dict[str, list[float]]:
    """By kind, a number for each seed."""
    found: dict[str, list[float]] = {}
    for result in results:
        found.setdefault(result.kind, []).append(result.bits)
    return found


def show(results: list[Result]) -> None:
    table = Table("attention")
    for title in ("parameters", "cache bytes a token", "bits per character", "range"):
        table.add_column(title, justify="right")
    first = {result.kind: result for result in reversed(results)}
    for kind, bits in bits_of(results).items():
        table.add_row(
            kind,
            f"{first[kind].parameters:,}",
            f"{first[kind].cache_bytes:,}",
            f"{statistics.mean(bits):.3f}",
            f"{min(bits):.3f}-{max(bits):.3f}",
        )
    console.print(table)


def write(results: list[Result], steps: int, seconds: float, out: Path) -> None:
    """attention_chars.json and, where there is matplotlib, a plot in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    numbers = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "kexue_kernels": kk.__version__},
        "threads": torch.get_num_threads(),
        "steps": steps,
        "seconds": seconds,
        "results": [row._asdict() for row in results],
    }
    (out / "attention_chars.json").write_text(json.dumps(numbers, indent=2) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        console.print("no plot: matplotlib is not installed")
    else:
        plot(results).savefig(out / "attention_chars.png", dpi=100)
    console.print(f"{seconds:.0f} seconds; written to the folder {out}", markup=False)


def plot(results: list[Result]) -> Figure:
    """Bits per character against cache bytes; bars from the worst seed to the best."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    cached = {result.kind: result.cache_bytes for result in results}
    for kind, bits in bits_of(results).items():
        mean = statistics.mean(bits)
        spread = [[mean - min(bits)], [max(bits) - mean]]
        axes.errorbar([cached[kind]], [mean], yerr=spread, marker="o", capsize=3, label=kind)
    axes.set(
        xscale="log",
        xlabel="cache bytes a token, all layers, float32",
        ylabel="bits per held-out character",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
