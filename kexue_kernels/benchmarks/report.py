"""What a run says to a reader: a markdown page, a table and a line for the console."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from kexue_kernels.benchmarks.results import ROWS, CaseResult

Record = Mapping[str, Any]

VERDICT_STYLE = {"met": "green", "missed": "red", "not measured": "dim"}


def line(result: CaseResult) -> Text:
    """One case, when it is done."""
    best, peer = result.best(), result.best_peer()
    if best is None or best.seconds is None:
        told = result.note or "; ".join(f"{m.name}: {m.note}" for m in result.contestants if m.ours)
        return Text(f"{result.name}: no time of ours: {told}", style="red")
    said = f"{result.name}: {duration(best.seconds)}, {percent(best.roof_share)} of the roof"
    if peer is not None:
        said += f", {best.speedup_over[peer.name]:.1f}x {peer.name}"
    wrong = [m.name for m in result.contestants if m.status in ("wrong", "error")]
    return Text(said + (f" (failed: {', '.join(wrong)})" if wrong else ""))


def table(record: Record) -> Table:
    """The goals of a run."""
    found = Table("case", "goal", "measured", "verdict", title="Goals")
    for name, goal in _goals(record):
        verdict = Text(goal["verdict"], style=VERDICT_STYLE[goal["verdict"]])
        found.add_row(name, goal["text"], _measured(goal), verdict)
    return found


def markdown(record: Record) -> str:
    return "\n".join(_lines(record))


def _lines(record: Record) -> Iterator[str]:
    machine, versions, roof = record["machine"], record["versions"], record["roof"]
    yield f"# Benchmark on {machine['name']}"
    yield ""
    yield f"- command: `{record['command']}`"
    yield f"- date: {record['date']}, {record['seconds']:.0f} s"
    yield f"- machine: {machine['name']}, {machine['threads']} CPU threads, {machine['platform']}"
    yield "- versions: " + ", ".join(f"{name} {version}" for name, version in versions.items())
    yield "- backends: " + "; ".join(f"{name}: {how}" for name, how in record["backends"].items())
    rates = (f"{kind} {rate / 1e12:.3g} TFLOP/s" for kind, rate in roof["flops_per_second"].items())
    yield (
        f"- roof, measured in this run: copy {roof['copy_bytes_per_second'] / 1e9:.4g} GB/s (read "
        f"plus written, buffers of {size(roof['copy_buffer_bytes'])}), matrix {', '.join(rates)}"
    )
    yield f"- time: {record['method']['time']}; median and quartiles"
    yield f"- memory: {record['method']['memory']}"
    for run in record.get("again", []):
        copy = run["roof"]["copy_bytes_per_second"] / 1e9
        yield f"- measured again {run['date']}, copy {copy:.4g} GB/s: {'; '.join(run['cases'])}"
    yield from _goal_lines(record)
    for case in record["cases"]:
        if case["status"] != "not run":
            yield from _case_lines(case)
    if record["not_run"]:
        yield from ("", "## Not run", "")
        yield from (f"- {case['name']}: {case['note']}" for case in _not_run(record))
    if record["plots"]:
        yield from ("", "## Plots", "")
        yield from (f"![{plot}]({plot})" for plot in record["plots"])


def _goal_lines(record: Record) -> Iterator[str]:
    yield from ("", "## Goals", "", "| case | goal | measured | by | verdict |")
    yield "|---|---|---|---|---|"
    for name, goal in _goals(record):
        yield f"| {name} | {goal['text']} | {_measured(goal)} | {goal['by']} | {goal['verdict']} |"


def _case_lines(case: Record) -> Iterator[str]:
    yield from ("", f"## {case['name']}", "")
    yield (
        f"{case['bytes']:,} bytes, {case['flops']:,} FLOPs ({case['counted']}); the roof is "
        f"{case['bound']}, {duration(case['roof_seconds'])}."
    )
    if case["note"]:
        yield f"\n**{case['status']}**: {case['note']}"
    yield ""
    rows = any(ROWS in m["errors"] for m in case["contestants"])
    titles = (
        "| contestant | median | quartiles | GB/s | TFLOP/s | of the roof | memory | ours ahead |"
    )
    yield titles + " rows wrong |" * rows
    yield "|---|---|---|---|---|---|---|---|" + "---|" * rows
    times = [m for m in case["contestants"] if m["ours"] and m["seconds"] is not None]
    best = min(times, key=lambda m: m["seconds"], default=None)
    for m in sorted(case["contestants"], key=lambda m: m["seconds"] or float("inf")):
        yield _row(m, best) + f" {_rows_wrong(m)} |" * rows


def _row(m: Record, best: Record | None) -> str:
    name = f"**{m['name']}**" if m["ours"] else m["name"]
    if m["seconds"] is None:
        return f"| {name} | {m['status']}: {m['note']} | | | | | | |"
    spread = " to ".join(duration(x) for x in m["quartiles"] or ())
    ahead = "" if m["ours"] or best is None else f"{best['speedup_over'][m['name']]:.2f}x"
    return (
        f"| {name} | {duration(m['seconds'])} | {spread} | {m['gb_per_second']:.4g} | "
        f"{m['tflop_per_second']:.3g} | {percent(m['roof_share'])} | {size(m['peak_bytes'])} | "
        f"{ahead} |"
    )


def _rows_wrong(m: Record) -> str:
    share = m["errors"].get(ROWS, {}).get("error")
    return "" if share is None else f"{share:.3g}"


def _goals(record: Record) -> Iterator[tuple[str, Record]]:
    for case in record["cases"]:
        for goal in case["goals"]:
            yield case["name"], goal


def _not_run(record: Record) -> Iterator[Record]:
    return (case for case in record["cases"] if case["status"] == "not run")


def _measured(goal: Record) -> str:
    return "" if goal["measured"] is None else f"{goal['measured']:.3g}"


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def size(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:,.1f} MiB"
