"""What the commands share: the family argument, `--json`, and printing JSON."""

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from kexue_kernels import families

Family = Annotated[str | None, typer.Argument(metavar="FAMILY", help="One family; else all.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]


def chosen_families(family: str | None) -> list[str]:
    if family is None:
        return families.names()
    return [one_of("FAMILY", family, families.names())]


def one_of(parameter: str, value: str, allowed: Sequence[str]) -> str:
    """`value`, or the usage error that names what is allowed."""
    if value not in allowed:
        raise typer.BadParameter(
            f"{value!r} is not one of {', '.join(allowed)}", param_hint=parameter
        )
    return value


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, default=str))
