"""Train a character-level language model with LRU blocks on Python's own documentation.

    python examples/char_lm.py --seconds 120

Prints what it learns and how fast, beside a unigram model and the reference backend, and writes
the curves and the numbers to --out. The model and the text are in char_lm_model.py.
"""

import copy
import math
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from char_lm_model import VOCABULARY, CharLM, Corpus, decode, encode, load_corpus
from char_lm_report import Results, Speed, console, show_corpus, show_speeds, write
from rich.panel import Panel
from rich.text import Text
from torch import Tensor
from torch.nn import functional as F

import kexue_kernels as kk

BATCH, LENGTH = 4, 256  # sequences of a training step, and their characters
LEARNING_RATE, WARM_UP = 6e-3, 0.05  # the peak, and the share of the budget spent reaching it
EVALUATIONS = 8  # during training
MARGIN = 1.0  # bits per character below the unigram model: what a minute of training must reach
PROMPT = "The with statement"


def main(
    seconds: Annotated[float, typer.Option(min=0.1, help="Time to train for.")] = 120.0,
    seed: Annotated[int, typer.Option(help="Of weights, batches and sample.")] = 0,
    characters: Annotated[int, typer.Option(min=1, help="Length of the sample.")] = 400,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/demo"),
    backend: Annotated[str, typer.Option(help="auto, reference, cpu, triton or cuda.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train a small language model on Python's documentation and check that it learned."""
    torch.manual_seed(seed)
    corpus = load_corpus(torch.device(device))
    model = CharLM().to(device)
    results = Results(seconds, seed, backend, device, corpus, model, unigram_bits(corpus))
    show_corpus(results)
    with kk.use_backend(backend):
        batch = draw_batch(corpus.train)
        choose_threads(model, batch, backend)
        results.speeds = {
            name: few_steps(model, batch, name) for name in dict.fromkeys((backend, "reference"))
        }
        show_speeds(results)
        train(model, corpus, results)
        sample = generate(model, PROMPT, characters)
    console.print(Panel(Text(sample), title="a continuation, sampled one step at a time"))
    write(results, sample, out)
    bits, unigram = results.held_out[-1].bits, results.unigram_bits
    console.print(f"held out: [bold]{bits:.3f}[/] bits per character (unigram {unigram:.3f})")
    if seconds >= 60 and bits > unigram - MARGIN:
        console.print(f"[red]expected at least {MARGIN} bit less than the unigram model's")
        raise typer.Exit(1)


def draw_batch(tokens: Tensor) -> Tensor:
    """[BATCH, LENGTH + 1] windows at random places: inputs and, one step on, targets."""
    starts = torch.randint(len(tokens) - LENGTH, (BATCH, 1), device=tokens.device)
    return tokens[starts + torch.arange(LENGTH + 1, device=tokens.device)]


def make_optimizer(model: CharLM) -> torch.optim.AdamW:
    """Decay of the matrices alone; half the rate for what sets the eigenvalues."""
    named = list(model.named_parameters())
    recurrent = [p for name, p in named if name.endswith("_log")]
    vectors = [p for name, p in named if p.ndim == 1 and not name.endswith("_log")]
    matrices = [p for _, p in named if p.ndim > 1]
    return torch.optim.AdamW(
        [
            {"params": recurrent, "initial_lr": LEARNING_RATE / 2, "weight_decay": 0.0},
            {"params": vectors, "initial_lr": LEARNING_RATE, "weight_decay": 0.0},
            {"params": matrices, "initial_lr": LEARNING_RATE, "weight_decay": 0.05},
        ],
        betas=(0.9, 0.98),
    )


def training_step(
    model: CharLM, optimizer: torch.optim.Optimizer, batch: Tensor, scale: float
) -> float:
    """One update at `scale` times the peak learning rate; the loss before it, in bits."""
    for group in optimizer.param_groups:
        group["lr"] = scale * group["initial_lr"]
    logits, _ = model(batch[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item() / math.log(2)


def few_steps(model: CharLM, batch: Tensor, backend: str, steps: int = 5) -> Speed:
    """Tokens per second and losses of a copy of the model, after one step to warm up."""
    model = copy.deepcopy(model)
    optimizer = make_optimizer(model)
    with kk.use_backend(backend):
        losses = [training_step(model, optimizer, batch, 0.1)]
        started = time.perf_counter()
        losses += [training_step(model, optimizer, batch, 0.1) for _ in range(steps)]
    return Speed(steps * BATCH * LENGTH / (time.perf_counter() - started), losses)


def choose_threads(model: CharLM, batch: Tensor, backend: str) -> None:
    """One CPU thread, or as many as PyTorch takes: whichever trains faster now.

    Steps this small gain little from threads, and lose much where other programs are running.
    """
    speeds = {}
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        speeds[threads] = few_steps(model, batch, backend).tokens_per_second
        console.print(f"{threads} thread(s): {speeds[threads]:,.0f} tokens/s")
    torch.set_num_threads(max(speeds, key=speeds.__getitem__))


def schedule(progress: float) -> float:
    """Linear warm-up, then a cosine down to nearly nothing, over `progress` from 0 to 1."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return min(1.0, 0.02 + progress / WARM_UP) * (0.01 + 0.99 * cosine)


def train(model: CharLM, corpus: Corpus, results: Results) -> None:
    """Train for the budget of seconds, evaluations not counted."""
    optimizer = make_optimizer(model)
    clock, steps, recent = 0.0, 0, []
    for part in range(1, EVALUATIONS + 1):
        while clock < results.seconds * part / EVALUATIONS or steps == 0:
            started = time.perf_counter()
            batch = draw_batch(corpus.train)
            recent.append(training_step(model, optimizer, batch, schedule(clock / results.seconds)))
            clock += time.perf_counter() - started
            steps += 1
        if recent:
            results.record(clock, steps * BATCH * LENGTH, recent, held_out_bits(model, corpus))
            recent = []


@torch.no_grad()
def held_out_bits(model: CharLM, corpus: Corpus, length: int = 16384) -> float:
    """Bits per character of the whole held-out text in one go, the states carried along."""
    model.eval()
    states, total = model.initial_states(1), 0.0
    inputs, targets = corpus.held_out[None, :-1], corpus.held_out[1:]
    for x, y in zip(inputs.split(length, dim=1), targets.split(length), strict=True):
        logits, states = model(x, states)
        total += F.cross_entropy(logits[0], y, reduction="sum").item()
    model.train()
    return total / len(targets) / math.log(2)


def unigram_bits(corpus: Corpus) -> float:
    """The same for a model that knows only how often each character occurs in training."""
    counts = torch.bincount(corpus.train, minlength=VOCABULARY).double() + 1
    return -(counts / counts.sum()).log2()[corpus.held_out[1:]].mean().item()


@torch.no_grad()
def generate(model: CharLM, prompt: str, characters: int, temperature: float = 0.7) -> str:
    """The prompt and its continuation, checking in passing that a step is what forward does."""
    model.eval()
    tokens = encode(prompt, model.head.weight.device)
    expected, _ = model(tokens[None])
    states = model.initial_states(1)
    for t, token in enumerate(tokens):
        logits, states = model.step(token[None], states)
        torch.testing.assert_close(logits, expected[:, t], rtol=1e-3, atol=1e-3)
    drawn = tokens.tolist()
    for _ in range(characters):
        token = torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1)[:, 0]
        drawn.append(token.item())
        logits, states = model.step(token, states)
    return decode(drawn)


if __name__ == "__main__":
    typer.run(main)
