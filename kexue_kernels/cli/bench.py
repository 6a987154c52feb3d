"""`bench`: the benchmark suite, from the command line."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from kexue_kernels.cli.options import Family, Json, chosen_families, one_of, print_json


def bench(
    family: Family = None,
    quick: Annotated[bool, typer.Option("--quick", help="The short list, under a minute.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; else a GPU if any.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for JSON, tables and plots.")] = None,
    time_limit: Annotated[
        float | None, typer.Option(min=0, help="Seconds after which to stop.")
    ] = None,
    again: Annotated[
        str | None, typer.Option(help="Only cases with this in their names, into --out's results.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure speed and memory against PyTorch, other packages and this machine's limits."""
    if family is not None:
        chosen_families(family)
    if device is not None:
        one_of("--device", device, ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("PyTorch sees no GPU", param_hint="--device")
    from kexue_kernels import benchmarks

    console = Console(stderr=json)
    try:
        results = benchmarks.run(
            family,
            quick=quick,
            device=device,
            out=out,
            time_limit=time_limit,
            again=again,
            console=console,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--again") from None
    if json:
        print_json(results)
