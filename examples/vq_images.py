"""Train a small VQ autoencoder on photographs three times: which codebook stays in use?

    python examples/vq_images.py --steps 300

Straight through, rotation and SimVQ start from the same weights and see the same crops. Writes
pictures, curves and numbers to --out. The model and the data are in vq_images_model.py.
"""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.nn import functional as F
from vq_images_model import METHODS, Autoencoder, Photos, crops, load_photos
from vq_images_report import Point, Run, console, show, write

BATCH, SIZE = 8, 64  # squares of a training step, and their pixels each way
LEARNING_RATE = 1e-3
EVALUATIONS = 10  # during training


def main(
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each method.")] = 300,
    seed: Annotated[int, typer.Option(help="Of weights and crops.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/vq_images"),
) -> None:
    """Train with each method and compare reconstructions and how much of the codebook is used."""
    photos = load_photos()
    runs = {}
    for name in METHODS:
        console.print(f"[bold]{name}")
        runs[name] = train(name, photos, steps, seed)
    show(runs)
    write(runs, photos, steps, seed, out)


def train(name: str, photos: Photos, steps: int, seed: int) -> Run:
    torch.manual_seed(seed)  # the same convolutions: they are drawn before the codebook
    model = Autoencoder(**METHODS[name])
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    torch.manual_seed(seed + 1)
    points = [evaluate(model, photos, 0)]
    every = max(1, steps // EVALUATIONS)
    started = time.perf_counter()
    for step in range(1, steps + 1):
        batch = crops(photos.train, BATCH, SIZE)
        made, loss = model(batch)
        (F.mse_loss(made, batch) + loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % every == 0 or step == steps:
            points.append(evaluate(model, photos, step))
    return Run(model, points, time.perf_counter() - started)


@torch.no_grad()
def evaluate(model: Autoencoder, photos: Photos, step: int) -> Point:
    """On the columns that training never sees."""
    model.eval()
    made, _ = model(photos.held_out)
    model.train()
    error = F.mse_loss(made.clamp(-1, 1), photos.held_out).item()
    decibel = 10 * torch.log10(torch.tensor(4 / error)).item()
    point = Point(step, decibel, model.quantizer.usage, model.quantizer.perplexity)
    console.print(
        f"step {step:5d}  {decibel:5.2f} dB  usage {point.usage:5.1%}  "
        f"perplexity {point.perplexity:6.1f}"
    )
    return point


if __name__ == "__main__":
    typer.run(main)
