"""The command line: info, selfcheck, bench, inspect. Each prints for people, or JSON."""

import typer

from kexue_kernels.cli.bench import bench
from kexue_kernels.cli.info import info
from kexue_kernels.cli.inspect import inspect
from kexue_kernels.cli.selfcheck import selfcheck

app = typer.Typer(
    help="Fused GPU and CPU kernels for PyTorch: what runs here, is it right, how fast is it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (info, selfcheck, bench, inspect):
    app.command()(command)


def main() -> None:
    app()
