"""Train the same character model with MHA, GQA, MQA and MLA, and compare what they cache.

    python examples/attention_chars.py --steps 600

The text is that of char_lm.py. Prints bits per held-out character beside the bytes that a token
leaves in the cache, writes a plot and the numbers to --out, and continues a prompt with the
latent model, whose cached steps must give what a whole pass gives.
"""

import math
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from attention_chars_model import KINDS, Caches, CharAttention
from attention_chars_report import Result, console, show, write
from char_lm_model import Corpus, decode, encode, load_corpus
from rich.panel import Panel
from rich.text import Text
from torch import Tensor
from torch.nn import functional as F

BATCH, LENGTH = 8, 256  # windows of a training step, and their characters
LEARNING_RATE, WARM_UP = 3e-3, 0.05
PROMPT = "The with statement"


def main(
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each model.")] = 600,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each kind, averaged.")] = 2,
    characters: Annotated[int, typer.Option(min=1, help="Length of the sample.")] = 300,
    windows: Annotated[int, typer.Option(min=1, help="Held-out windows, at most.")] = 10000,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path(
        "out/attention_chars"
    ),
) -> None:
    """Compare bits per character against cache bytes per token."""
    corpus = load_corpus(torch.device("cpu"))
    results, started = [], time.perf_counter()
    for seed in range(seeds):
        for kind in (*KINDS, "MLA"):
            torch.manual_seed(seed)
            model = train(CharAttention(kind), corpus, steps, seed)
            parameters = sum(p.numel() for p in model.parameters())
            bits = held_out_bits(model, corpus, windows)
            results.append(Result(kind, seed, parameters, 4 * model.cached(), bits))
            console.print(f"seed {seed} {kind}: {bits:.3f} bits per held-out character")
    sample = generate(model, PROMPT, characters)
    console.print(Panel(Text(sample), title="MLA's continuation, from its latent cache"))
    show(results)
    write(results, steps, time.perf_counter() - started, out)


def train(model: CharAttention, corpus: Corpus, steps: int, seed: int) -> CharAttention:
    """Every kind sees the same batches in the same order."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98))
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * schedule((step + 1) / steps)
        starts = torch.randint(len(corpus.train) - LENGTH, (BATCH, 1), generator=draw)
        batch = corpus.train[starts + torch.arange(LENGTH + 1)]
        loss_of(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def loss_of(model: CharAttention, windows: Tensor) -> Tensor:
    """Nats per character of windows [B, LENGTH + 1]."""
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def schedule(progress: float) -> float:
    """Linear warm-up, then a cosine to nearly nothing."""
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return min(1.0, progress / WARM_UP) * (0.01 + 0.99 * cosine)


@torch.no_grad()
def held_out_bits(model: CharAttention, corpus: Corpus, most: int) -> float:
    """Bits per character of held-out windows, each of which starts without a past."""
    windows = corpus.held_out.unfold(0, LENGTH + 1, LENGTH)[:most]
    losses = [loss_of(model, batch) * len(batch) for batch in windows.split(32)]
    return torch.stack(losses).sum().item() / len(windows) / math.log(2)


@torch.no_grad()
def generate(model: CharAttention, prompt: str, characters: int, temperature: float = 0.7) -> str:
    """The prompt and its continuation; an error unless cached steps do what one pass does."""
    tokens = encode(prompt, torch.device("cpu"))[None]
    caches = Caches.for_tokens(tokens.shape[1] + characters)
    steps = [model(token, caches) for token in tokens.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), model(tokens), rtol=1e-3, atol=1e-3)
    logits, drawn = steps[-1], tokens[0].tolist()
    for _ in range(characters):
        token = torch.multinomial(torch.softmax(logits[:, -1] / temperature, dim=-1), 1)
        drawn.append(int(token))
        logits = model(token, caches)
    return decode(drawn)


if __name__ == "__main__":
    typer.run(main)
