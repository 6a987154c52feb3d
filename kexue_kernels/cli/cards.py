"""A card, drawn."""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from kexue_kernels.offline.archs import ARCHS
from kexue_kernels.offline.card import Card, Roofline
from kexue_kernels.offline.instructions import Loop
from kexue_kernels.offline.occupancy import Occupancy

NAMES = {
    "tensor": "tensor core",
    "global": "global memory",
    "shared": "shared memory",
    "local": "spills",
    "special": "special function",
    "fp32": "FP32",
    "fp64": "FP64",
}


def panel(card: Card) -> Panel:
    title = f"[bold]{escape(card.op)}[/] {escape(card.name)} [cyan]{card.arch}[/] ({card.backend})"
    body: RenderableType = f"[red]does not compile[/]: {escape(card.error)}"
    if not card.error:
        body = Group(_table(_resources(card)), *_loop(card.loop), *_verdict(card))
    return Panel(body, title=title, title_align="left", border_style=_colour(card))


def _colour(card: Card) -> str:
    return "red" if card.problems else "green"


def _table(rows: Iterator[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, text)
    return table


def _resources(card: Card) -> Iterator[tuple[str, str]]:
    yield "kernel", escape(card.kernel)
    yield "launch", ", ".join(_launch(card))
    yield "registers", f"{card.registers} a thread"
    yield "spills", ", ".join(_spills(card))
    if card.shared is not None and card.shared_limit is not None:
        share = card.shared / card.shared_limit
        limit = f"{card.shared_limit / 1024:.0f} KiB"
        yield "shared memory", f"{card.shared / 1024:.1f} KiB of {limit} a block ({share:.0%})"
    yield "occupancy", _occupancy(card.occupancy)
    if card.roofline is not None:
        yield "the op's roofline", _roofline(card.roofline)


def _launch(card: Card) -> Iterator[str]:
    yield f"{card.threads} threads a block" if card.threads else "block size set at launch"
    if card.num_warps is not None:
        yield f"{card.num_warps} warps"
    if card.num_stages is not None:
        yield f"{card.num_stages} stages"


def _spills(card: Card) -> Iterator[str]:
    yield f"{card.spills} to memory"
    yield f"{card.stack} bytes of stack a thread"
    if card.scalar_spills:
        yield f"{card.scalar_spills} scalar registers in vector lanes"


def _occupancy(held: Occupancy | None) -> str:
    if held is None:
        return "unknown: compiled without launch bounds"
    return (
        f"{held.share:.0%}: {held.blocks} blocks, {held.warps} warps, {held.threads} threads, "
        f"limited by {' and '.join(held.limited_by)}"
    )


def _roofline(roof: Roofline) -> str:
    return (
        f"{roof.bound}-bound: {roof.bytes_per_element:g} bytes and {roof.flops_per_element:g} FLOP "
        f"an element, {roof.intensity:.3g} FLOP/byte against the ridge's {roof.ridge:.3g}; "
        f"{roof.elements_per_second / 1e9:.0f}e9 elements/s at the datasheet rates of "
        f"{roof.device}"
    )


def _loop(loop: Loop | None) -> Iterator[RenderableType]:
    if loop is None:
        return
    where = "hottest loop" if loop.is_loop else "whole kernel, no loop in it is hot"
    yield f"[bold]{where}[/]: {loop.instructions} instructions"
    mix = Table("instruction", "count", "share", box=None, padding=(0, 2))
    for kind, count in loop.mix.items():
        mix.add_row(NAMES.get(kind, kind), str(count), f"{count / loop.instructions:.0%}")
    pipes = Table("pipe", "cycles a warp", box=None, padding=(0, 2))
    for name, cycles in loop.cycles.items():
        pipes.add_row(name, f"{cycles:.1f}")
    if "tensor" in loop.mix and "tensor core" not in loop.cycles:
        pipes.add_row("tensor core", "not in the code")  # its shape is in a descriptor
    both = Table.grid(padding=(0, 4))
    both.add_row(mix, pipes)
    yield both


def _verdict(card: Card) -> Iterator[RenderableType]:
    if card.loop is not None and card.loop.busiest:
        yield (
            f"[bold]busiest pipe[/]: {card.loop.busiest}, if each of these instructions issues "
            f"once and all global memory is DRAM ({ARCHS[card.arch].datasheet.device})"
        )
    for problem in card.problems:
        yield f"[red]{escape(problem)}[/]"
