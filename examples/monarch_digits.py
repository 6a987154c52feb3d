"""Read handwritten digits with a dense layer, and with Monarch layers instead of it.

    python examples/monarch_digits.py --epochs 20

Dense perceptrons of several widths, the widest with a Monarch in the middle trained from scratch,
and that Monarch projected from the trained dense layer, before and after finetuning. Writes a
plot and numbers to --out. The model and the data are in monarch_digits_model.py.
"""

import copy
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from monarch_digits_model import (
    WIDTH,
    Digits,
    flops,
    is_square,
    load_digits,
    parameters,
    perceptron,
)
from monarch_digits_report import Result, console, show, write
from torch import nn
from torch.nn import functional as F

import kexue_kernels as kk

BATCH = 100
LEARNING_RATE = 1e-3
FINETUNING = 3  # finetuning is this many times shorter than training
WIDTHS = (32, 64, 128, 256, 512)  # of the other dense perceptrons


def main(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 20,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each model, averaged.")] = 3,
    blocks: Annotated[str, typer.Option(help="nblocks of the Monarchs.")] = "4,8,16,32",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/monarch_digits"),
) -> None:
    """Compare accuracy on held-out images against parameters and FLOPs."""
    digits = load_digits()
    results: list[Result] = []
    started = time.perf_counter()
    for seed in range(seeds):
        console.print(f"[bold]seed {seed}")
        results += run(digits, epochs, seed, [int(n) for n in blocks.split(",")])
    show(results)
    write(results, epochs, seeds, time.perf_counter() - started, out)


def run(digits: Digits, epochs: int, seed: int, blocks: list[int]) -> list[Result]:
    """Every model once."""
    results = []

    def note(kind: str, size: int, model: nn.Module, error: float | None = None) -> None:
        right = accuracy(model, digits)
        results.append(Result(kind, size, parameters(model), flops(model), error, right))
        console.print(f"{kind:10s} {size:5d}  {right:6.2%}")

    for width in WIDTHS:
        torch.manual_seed(seed)
        note("dense", width, train(perceptron(width), digits, epochs, seed))
    torch.manual_seed(seed)
    dense = train(perceptron(), digits, epochs, seed)
    note("dense", WIDTH, dense)
    for nblocks in blocks:
        torch.manual_seed(seed)
        model = train(perceptron(nblocks=nblocks), digits, epochs, seed)
        note("scratch", nblocks, model)
        model = copy.deepcopy(dense)
        (layer,) = kk.monarchize(model, nblocks, filter=is_square).converted
        note("projected", nblocks, model, layer.relative_error)
        train(model, digits, max(1, epochs // FINETUNING), seed)
        note("finetuned", nblocks, model, layer.relative_error)
    return results


def train(model: nn.Sequential, digits: Digits, epochs: int, seed: int) -> nn.Sequential:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(digits.train), generator=order).split(BATCH):
            loss = F.cross_entropy(model(digits.train[rows]), digits.train_classes[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Of the held-out images."""
    return (model(digits.held_out).argmax(1) == digits.held_out_classes).float().mean().item()


if __name__ == "__main__":
    typer.run(main)
