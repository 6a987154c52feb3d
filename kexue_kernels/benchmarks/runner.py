"""A run: the roof, then every case in order of importance, written down as they finish."""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kexue_kernels.benchmarks import machine, mla, monarch, plots, report, roof, scan, vq
from kexue_kernels.benchmarks.case import Case
from kexue_kernels.benchmarks.clock import Clock
from kexue_kernels.benchmarks.measure import FULL, QUICK, Stage, blank, estimate, measure
from kexue_kernels.benchmarks.results import NO_TIME, CaseResult

FAMILIES: Mapping[str, Callable[[torch.device], list[Case]]] = {
    "scan": scan.cases,
    "mla": mla.cases,
    "monarch": monarch.cases,
    "vq": vq.cases,
}
DEFAULT_OUT = pathlib.Path("out/bench")
REPORT_SECONDS = 6.0  # of a time limit, kept for the table and the plots
QUICK_SECONDS = 50.0  # of a quick run, where no limit was given


def run(
    family: str | None = None,
    *,
    quick: bool = False,
    device: str | None = None,
    out: pathlib.Path | None = None,
    time_limit: float | None = None,
    again: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure a family's cases (all families' if None) and return what is in bench.json.

    Args:
        family: one of `FAMILIES`.
        quick: only the cases marked so, timed for a shorter while.
        device: "cpu" or "cuda"; the GPU where there is one if None.
        out: the folder for bench.json (rewritten after every case), bench.md and plots (PNG);
            out/bench if None.
        time_limit: seconds (50 for a quick run if None, else none). A case that may take longer
            than what is left is not started, and listed as not run.
        again: measure only cases with this in their names, and put them in the place of those in
            the results that `out` holds, which keep the rest. What was done again is listed.
        console: where progress and the table go; standard error if None.

    Raises:
        ValueError: an unknown family or device; with `again`, no such case or no results.
    """
    start = time.monotonic()
    chosen, console = _device(device), console or Console(stderr=True)
    out = out or DEFAULT_OUT
    if quick and time_limit is None:
        time_limit = QUICK_SECONDS
    cases = _cases(family, chosen, quick)
    record = _record(family, quick, chosen)
    earlier: dict[str, Any] | None = None
    if again is not None:
        cases, earlier = _only(again, cases), _earlier(out)
        record["command"] += f" --again {again!r}"
    clock = Clock(chosen)
    measured = roof.measure(chosen, clock, quick)
    record |= {"method": clock.method, "roof": dataclasses.asdict(measured)}
    deadline = float("inf") if time_limit is None else start + time_limit - REPORT_SECONDS
    stage = Stage(chosen, measured, clock, QUICK if quick else FULL, deadline)
    results: list[CaseResult] = []

    def save() -> dict[str, Any]:
        record["seconds"] = time.monotonic() - start
        record["cases"] = [dataclasses.asdict(result) for result in results]
        whole = record if earlier is None else _replaced(earlier, record)
        whole["not_run"] = [case["name"] for case in whole["cases"] if case["status"] == "not run"]
        _write(out / "bench.json", json.dumps(whole, indent=1, allow_nan=False))
        return whole

    save()
    _perform(cases, stage, results, save, console)
    whole = save()
    (record if earlier is None else earlier).update(
        zip(("plots", "plots_note"), plots.draw(whole, out), strict=True)
    )
    record = save()
    _write(out / "bench.md", report.markdown(record))
    console.print(report.table(record))
    files = ", ".join(["bench.json", "bench.md", *record["plots"]])
    console.print(f"written to {out}: {files}", soft_wrap=True)
    return record


def _perform(
    cases: list[Case],
    stage: Stage,
    results: list[CaseResult],
    save: Callable[[], object],
    console: Console,
) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    spent = guessed = 0.0
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:

            def say(what: str, case: Case = case) -> None:
                progress.update(task, description=f"{case.name}: {what}")

            guess = estimate(case, stage.roof, stage.effort)
            slower = max(1.0, spent / guessed) if guessed else 1.0  # here, than estimates so far
            if stage.late(slower * guess):
                result = blank(case, stage.roof, NO_TIME)
            else:
                result = measure(case, dataclasses.replace(stage, say=say))
                spent, guessed = spent + result.seconds, guessed + guess
                progress.console.print(report.line(result), soft_wrap=True)
            results.append(result)
            save()
            progress.advance(task)


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda', got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: 'cuda' was asked for, PyTorch sees no GPU")
    return torch.device(name)


def _cases(family: str | None, device: torch.device, quick: bool) -> list[Case]:
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    names = FAMILIES if family is None else [family]
    cases = [case for name in names for case in FAMILIES[name](device)]
    kept = [case for case in cases if case.quick or not quick]
    return sorted(kept, key=lambda case: case.priority)


def _only(words: str, cases: list[Case]) -> list[Case]:
    found = [case for case in cases if words in case.name]
    if not found:
        raise ValueError(f"again: expected words of a case's name, got {words!r}")
    return found


def _earlier(out: pathlib.Path) -> dict[str, Any]:
    file = out / "bench.json"
    if not file.exists():
        raise ValueError(f"again: expected a folder with results, got {out}")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def _replaced(earlier: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """`earlier` with the cases of `record` in the place of its own, and word of it."""
    fresh = {case["name"]: case for case in record["cases"]}
    kept = [fresh.pop(case["name"], case) for case in earlier["cases"]]
    said = {name: record[name] for name in ("command", "date", "machine", "versions", "roof")}
    said["cases"] = [case["name"] for case in record["cases"]]
    again = [*earlier.get("again", []), said]
    return earlier | {"cases": [*kept, *fresh.values()], "again": again}


def _record(family: str | None, quick: bool, device: torch.device) -> dict[str, Any]:
    words = ["python -m kexue_kernels bench", family, "--quick" if quick else None]
    return {
        "schema": 1,
        "command": " ".join(word for word in (*words, f"--device {device.type}") if word),
        "date": machine.now(),
        "machine": machine.device(device),
        "versions": machine.versions(),
        "backends": machine.backends(),
    }


def _write(path: pathlib.Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(path.suffix + ".unfinished")
    unfinished.write_text(text + "\n")
    os.replace(unfinished, path)
