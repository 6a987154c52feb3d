"""What char_lm.py prints and writes: tables, a plot, and the numbers as JSON."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import statistics
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from char_lm_model import CharLM, Corpus
from rich.console import Console
from rich.table import Table

import kexue_kernels as kk

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

console = Console()


class Speed(NamedTuple):
    """A few training steps on one batch."""

    tokens_per_second: float
    bits: list[float]  # the loss of each step, in bits per character


class Point(NamedTuple):
    """Of a learning curve."""

    seconds: float  # of training
    bits: float  # per character


@dataclass
class Results:
    """One run, filled as it goes."""

    seconds: float
    seed: int
    backend: str
    device: str
    corpus: Corpus
    model: CharLM
    unigram_bits: float
    speeds: dict[str, Speed] = field(default_factory=dict)
    train: list[Point] = field(default_factory=list)
    held_out: list[Point] = field(default_factory=list)
    tokens: int = 0

    def record(self, seconds: float, tokens: int, recent: list[float], held_out: float) -> None:
        """A point of both curves, after `tokens` in `seconds` of training."""
        self.tokens = tokens
        self.train.append(Point(seconds, statistics.fmean(recent)))
        self.held_out.append(Point(seconds, held_out))
        if len(self.train) == 1:
            console.print("seconds     tokens  tokens/s  train  held out (bits per character)")
        console.print(
            f"{seconds:7.1f} {tokens:10,} {tokens / seconds:9,.0f}  "
            f"{self.train[-1].bits:5.3f}  {held_out:8.3f}"
        )


def show_corpus(results: Results) -> None:
    corpus, model = results.corpus, results.model
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"Python's documentation topics: {len(corpus.train):,} characters to learn, "
        f"{len(corpus.held_out):,} held out\n"
        f"unigram model: {results.unigram_bits:.3f} bits per held-out character\n"
        f"model: {len(model.blocks)} LRU blocks, {parameters:,} parameters, {results.device}"
    )


def show_speeds(results: Results) -> None:
    """The same steps by each backend; an error unless they compute the same losses."""
    table = Table("backend", "tokens/s", "loss of each step, bits per character")
    for name, speed in results.speeds.items():
        losses = "  ".join(f"{bits:.5f}" for bits in speed.bits)
        table.add_row(name, f"{speed.tokens_per_second:,.0f}", losses)
    console.print(table)
    reference = torch.tensor(results.speeds["reference"].bits)
    for speed in results.speeds.values():
        torch.testing.assert_close(torch.tensor(speed.bits), reference, rtol=1e-4, atol=0)


def write(results: Results, sample: str, out: Path) -> None:
    """char_lm.json and, where there is matplotlib, char_lm.png in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "char_lm.json").write_text(json.dumps(_numbers(results, sample), indent=2) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        console.print("no plot: matplotlib is not installed")
    else:
        plot(results).savefig(out / "char_lm.png", dpi=120)
    console.print(f"written to the folder {out}", markup=False)


def _numbers(results: Results, sample: str) -> dict[str, object]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": results.device,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "kexue_kernels": kk.__version__,
        },
        "backends": {name: status._asdict() for name, status in kk.backends().items()},
        "backend": results.backend,
        "seed": results.seed,
        "parameters": sum(p.numel() for p in results.model.parameters()),
        "train_characters": len(results.corpus.train),
        "held_out_characters": len(results.corpus.held_out),
        "unigram_bits": results.unigram_bits,
        "held_out_bits": results.held_out[-1].bits,
        "training_seconds": results.held_out[-1].seconds,
        "training_tokens": results.tokens,
        "speeds": {name: speed._asdict() for name, speed in results.speeds.items()},
        "train": results.train,
        "held_out": results.held_out,
        "sample": sample,
    }


def plot(results: Results) -> Figure:
    """Three panels: training loss, held-out bits, tokens per second."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    losses, held_out, speed = figure.subplots(1, 3)
    _curve(losses, results.train, "training loss")
    _curve(held_out, results.held_out, "held-out text")
    held_out.axhline(results.unigram_bits, color="tab:red", linestyle="--", label="unigram model")
    held_out.legend()
    names = list(results.speeds)
    bars = speed.bar(names, [results.speeds[name].tokens_per_second for name in names])
    speed.bar_label(bars, fmt="{:,.0f}")
    speed.set(title="training speed", xlabel="backend", ylabel="tokens per second")
    return figure


def _curve(axes: Axes, points: list[Point], title: str) -> None:
    seconds, bits = zip(*points, strict=True)
    axes.plot(seconds, bits, marker="o", label="LRU model")
    axes.set(title=title, xlabel="seconds of training", ylabel="bits per character")
    axes.grid(alpha=0.3)
