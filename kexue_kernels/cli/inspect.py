"""`inspect`: what each kernel compiles to; no GPU needed."""

import importlib.util
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kexue_kernels.cli.cards import panel
from kexue_kernels.cli.options import Family, Json, chosen_families, one_of, print_json
from kexue_kernels.offline import cubins, pool
from kexue_kernels.offline import triton as triton_kernels
from kexue_kernels.offline.archs import ARCHS, DEFAULT_ARCHS
from kexue_kernels.offline.card import Card


def inspect(
    family: Family = None,
    arch: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(ARCHS)}; may be repeated. Else {', '.join(DEFAULT_ARCHS)}."),
    ] = None,
    kernel: Annotated[
        str, typer.Option(metavar="SUBSTRING", help="Only kernels whose op or name has this in it.")
    ] = "",
    json: Json = False,
) -> None:
    """Compile every kernel, without a GPU, and show what it needs and what bounds it.

    Exit status 1 where one does not compile, spills or exceeds the GPU's shared memory.
    """
    families = chosen_families(family)
    archs = [one_of("--arch", name, list(ARCHS)) for name in arch or DEFAULT_ARCHS]
    output, remarks = Console(), Console(stderr=True)
    cards = []
    with tempfile.TemporaryDirectory() as folder:
        jobs, notes = _jobs(Path(folder), families, archs, kernel)
        for note in notes:
            remarks.print(escape(note), highlight=False)
        with _progress(output if output.is_terminal and not json else remarks) as progress:
            for made in progress.track(pool.run(jobs), total=len(jobs)):
                chosen = [card for card in made if _wanted(card, families, kernel)]
                cards += chosen
                for card in [] if json else chosen:
                    output.print(panel(card))
    if kernel and not cards:
        remarks.print(f"--kernel: no op or name has {escape(kernel)!r} in it", highlight=False)
    if json:
        print_json([asdict(card) for card in cards])
    raise typer.Exit(1 if any(card.problems for card in cards) else 0)


def _jobs(
    folder: Path, families: list[str], archs: list[str], kernel: str
) -> tuple[list[pool.Job], list[str]]:
    """What to compile or read, and what to say of what is not there."""
    found, note = cubins.extract(folder, archs)
    notes = [note] if note else []
    jobs: list[pool.Job] = []
    if importlib.util.find_spec("triton") is None:
        notes.append("Triton is not installed, so its kernels can't be compiled")
    else:
        jobs += _triton_jobs(families, archs, kernel)
    return jobs + [(cubins.cards, pair) for pair in found], notes


def _triton_jobs(families: list[str], archs: list[str], kernel: str) -> Iterator[pool.Job]:
    for family in families:
        for module in triton_kernels.modules(family):
            for index, case in enumerate(triton_kernels.cases(module)):
                if any(kernel in word for word in (case.op, case.name, case.kernel)):
                    for arch in archs:
                        if arch in (case.archs or ARCHS):
                            yield triton_kernels.cards, (family, module, index, arch)


def _wanted(card: Card, families: list[str], kernel: str) -> bool:
    named = any(kernel in word for word in (card.op, card.name, card.kernel))
    return named and card.family in [*families, ""]  # "": a CUDA kernel named after no op


def _progress(console: Console) -> Progress:
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
