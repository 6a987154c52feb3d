"""`info`: versions, devices, and which backends are on and why not."""

import platform
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kexue_kernels import families
from kexue_kernels.cli import machine
from kexue_kernels.cli.options import Json, print_json

NOT_RUN = "no GPU has run this kernel yet"
OFF = "; off by default (name the backend to use it)"


def info(json: Json = False) -> None:
    """Versions, devices, and which backends are on and why not."""
    facts = gather()
    if json:
        print_json(facts)
    else:
        _show(facts, Console())


def gather() -> dict[str, Any]:
    return {
        "versions": machine.versions(),
        "system": platform.platform(),
        "cpu": machine.cpu(),
        "cuda": machine.cuda(),
        "extension": machine.extension(),
        "backends": machine.backend_states(),
        "gpu_kernels": machine.gpu_runs(
            {family: families.ops(family) for family in families.names()}
        ),
    }


def _show(facts: dict[str, Any], console: Console) -> None:
    console.print(_machine_table(facts))
    console.print(_backend_table(facts["backends"]))
    console.print(_kernel_table(facts["gpu_kernels"]))


def _machine_table(facts: dict[str, Any]) -> Table:
    table = Table(title="This machine", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, version in facts["versions"].items():
        table.add_row(name, version or "not installed")
    cpu = facts["cpu"]
    table.add_row("system", facts["system"])
    table.add_row("CPU", f"{cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads in use")
    table.add_row("instruction set", f"{cpu['isa']} ({cpu['isa_of']})")
    for name, text in _cuda_rows(facts["cuda"]):
        table.add_row(name, text)
    table.add_row("C++ extension", escape(_extension_text(facts["extension"])))
    return table


def _cuda_rows(cuda: dict[str, Any]) -> list[tuple[str, str]]:
    runtime = f"runtime {cuda['runtime']}" if cuda["runtime"] else "this PyTorch has none"
    driver = f"driver {cuda['driver']}" if cuda["driver"] else "no NVIDIA driver answers"
    devices = [
        (
            f"GPU {index}",
            f"{gpu['name']}, capability {gpu['capability']}, {gpu['multiprocessors']} SMs, "
            f"{gpu['memory'] / 2**30:.1f} GiB",
        )
        for index, gpu in enumerate(cuda["devices"])
    ]
    return [("CUDA", f"{runtime}; {driver}"), *(devices or [("GPU", "PyTorch sees none")])]


def _extension_text(extension: dict[str, Any]) -> str:
    if not extension["usable"]:
        return extension["reason"]
    built = [f"{name} {value}" for name, value in extension["build"].items() if value]
    return f"{extension['file']} ({', '.join(built)})"


def _backend_table(states: dict[str, dict[str, Any]]) -> Table:
    table = Table("backend", "", "why", title="Backends", title_justify="left")
    for name, state in states.items():
        on = "[green]on[/]" if state["available"] else "[red]off[/]"
        table.add_row(name, on, escape(state["reason"]))
    return table


def _kernel_table(kernels: list[dict[str, Any]]) -> Table:
    table = Table("op", "backend", "has run on", title="GPU kernels", title_justify="left")
    for kernel in kernels:
        run_on = ", ".join(kernel["devices"]) or NOT_RUN
        table.add_row(kernel["op"], kernel["backend"], run_on + OFF * kernel["off_by_default"])
    return table
