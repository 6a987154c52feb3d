"""`inspect`: what each kernel compiles to; no GPU needed."""

import importlib.util
import tempfile
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
    console, remarks = Console(), Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        jobs, notes = _triton_jobs(families, archs, kernel)
        extracted, note = _cuda_jobs(Path(folder), archs)
        cards = _run([*jobs, *extracted], remarks)
    cards = [card for card in cards if card.family in families and _matches(card, kernel)]
    for text in filter(None, [*notes, note]):
        remarks.print(escape(text), highlight=False)
    if json:
        print_json([asdict(card) for card in cards])
    else:
        for card in cards:
            console.print(panel(card))
    raise typer.Exit(1 if any(card.problems for card in cards) else 0)


def _triton_jobs(
    families: list[str], archs: list[str], kernel: str
) -> tuple[list[pool.Job], list[str]]:
    if importlib.util.find_spec("triton") is None:
        return [], ["Triton is not installed, so its kernels can't be compiled"]
    jobs: list[pool.Job] = [
        (triton_kernels.cards, (family, module, index, arch))
        for family in families
        for module in triton_kernels.modules(family)
        for index, case in enumerate(triton_kernels.cases(module))
        if any(kernel in word for word in (case.op, case.name, case.kernel))
        for arch in archs
    ]
    return jobs, []


def _cuda_jobs(folder: Path, archs: list[str]) -> tuple[list[pool.Job], str]:
    found, note = cubins.extract(folder, archs)
    return [(cubins.cards, pair) for pair in found], note


def _matches(card: Card, kernel: str) -> bool:
    return any(kernel in word for word in (card.op, card.name, card.kernel))


def _run(jobs: list[pool.Job], console: Console) -> list[Card]:
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task("", total=len(jobs))
        return pool.run(jobs, lambda: progress.advance(task))
