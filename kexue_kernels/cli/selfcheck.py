"""`selfcheck`: every op against its reference, on this machine."""

import time
from dataclasses import asdict
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from kexue_kernels import backends, dispatch, launchers
from kexue_kernels.cli.checking import Checker, Result
from kexue_kernels.cli.options import Family, Json, chosen_families, one_of, print_json
from kexue_kernels.cli.selfcheck_cases import Case, cases

CHECKED = tuple(name for name in dispatch.NAMES if name != "reference")


class Skipped(NamedTuple):
    backend: str
    cases: str  # "all", "long" or an op's
    reason: str


def selfcheck(
    family: Family = None,
    backend: Annotated[str | None, typer.Option(help="One backend; else all that are on.")] = None,
    json: Json = False,
) -> None:
    """Check every op against its reference here: values and gradients. Exit status 1 on a miss."""
    families = chosen_families(family)
    wanted = CHECKED if backend is None else (one_of("--backend", backend, CHECKED),)
    started = time.perf_counter()
    states = {name: backends()[name] for name in wanted}
    running = [name for name, state in states.items() if state.available]
    skipped = [Skipped(name, "all", states[name].reason) for name in wanted if name not in running]
    if any(_interpreted(name) for name in running):
        skipped.append(Skipped("triton", "long", "Triton's interpreter would take minutes"))
    skipped += _without_kernels(families, running)
    results = _run(families, running, Console(stderr=True))
    asked_in_vain = backend is not None and backend not in running
    ok = all(result.ok for result in results) and not asked_in_vain
    seconds = time.perf_counter() - started
    if json:
        print_json(_plain(results, skipped, ok, seconds))
    else:
        _show(Console(), results, skipped, seconds)
    raise typer.Exit(0 if ok else 1)


def _run(families: list[str], running: list[str], console: Console) -> list[Result]:
    every = [(family, case) for family in families for case in cases(family)]
    results = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("checking", total=len(every))
        for family, case in every:
            checker = Checker(case)
            chosen = [name for name in running if _serves(name, family, case)]
            chosen = [name for name in chosen if case.interpreted or not _interpreted(name)]
            results += [checker.check(name, _device(name)) for name in chosen]
            progress.advance(task)
    return results


def _serves(backend: str, family: str, case: Case) -> bool:
    """The cpu backend serves every op, if need be in plain PyTorch."""
    op = case.kernels or case.op
    off = (backend, op) in launchers.OFF_BY_DEFAULT
    return backend == "cpu" or (not off and launchers.implements(family, op, backend))


def _without_kernels(families: list[str], running: list[str]) -> list[Skipped]:
    unserved = {
        (backend, case.op)
        for family in families
        for case in cases(family)
        for backend in running
        if not _serves(backend, family, case)
    }
    why = "it has no kernels for it, or they are off by default"
    return [Skipped(backend, op, why) for backend, op in sorted(unserved)]


def _interpreted(backend: str) -> bool:
    return backend == "triton" and dispatch.interpreting()


def _device(backend: str) -> str:
    return "cpu" if backend == "cpu" or _interpreted(backend) else "cuda"


def _plain(
    results: list[Result], skipped: list[Skipped], ok: bool, seconds: float
) -> dict[str, Any]:
    return {
        "ok": ok,
        "results": [asdict(result) | {"ok": result.ok} for result in results],
        "skipped": [each._asdict() for each in skipped],
        "seconds": seconds,
    }


def _show(console: Console, results: list[Result], skipped: list[Skipped], seconds: float) -> None:
    if results:
        console.print(_table(results))
    for backend, which, reason in skipped:
        what = f"[yellow]not checked[/]: {backend}, {which} cases ({escape(reason)})"
        console.print(what, highlight=False)
    misses = sum(not result.ok for result in results)
    verdict = f"[red]{misses} missed[/]" if misses else "[green]all right[/]"
    if not results:
        verdict = "[yellow]nothing was checked[/]"
    console.print(f"{len(results)} checks in {seconds:.1f} s: {verdict}", highlight=False)


def _table(results: list[Result]) -> Table:
    table = Table(
        "op",
        "backend",
        "case",
        "closest",
        "error",
        "allowed",
        "ok",
        caption="error: the largest deviation from the reference in float64; allowed: twice that "
        "of the reference in the same dtype, plus rounding; closest: the tensor nearest to it",
        caption_justify="left",
    )
    for result in results:
        mark = "[green]yes[/]" if result.ok else "[red]NO[/]"
        row = [result.op, result.backend, escape(result.case)]
        if result.failure:
            table.add_row(*row, f"[red]{escape(result.failure)}[/]", "", "", mark)
        else:
            row += [result.worst, f"{result.error:.2e}", f"{result.allowed:.2e}"]
            table.add_row(*row, mark)
    return table
