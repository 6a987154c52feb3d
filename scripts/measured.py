"""Write README.md's table of measurements from benchmarks/results.

`make bench` runs it. Rows are the benchmark's cases that have goals; their numbers come from
benchmarks/results/<device>/bench.json, and a row without any says so.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from kexue_kernels.benchmarks import FAMILIES, report

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
NOT_MEASURED = "not measured yet"

Record = dict[str, Any]


def load(device: str) -> Record | None:
    file = RESULTS / device / "bench.json"
    return json.loads(file.read_text()) if file.exists() else None


def cell(case: Record | None) -> str:
    """The fastest of ours: time, share of the copy's bandwidth, peers, and what it missed."""
    measured = [m for m in case["contestants"] if m["ours"] and m["seconds"]] if case else []
    if case is None or not measured:
        return NOT_MEASURED
    best = min(measured, key=lambda m: m["seconds"])
    peers = sorted(best["speedup_over"].items(), key=lambda item: item[1])
    missed = [goal["text"] for goal in case["goals"] if goal["verdict"] == "missed"]
    parts = [
        f"{report.duration(best['seconds'])}, {best['copy_share']:.0%} of copy bandwidth",
        ", ".join(f"{ahead:.1f}x {peer}" for peer, ahead in peers),
        f"missed: {', '.join(missed)}" if missed else "",
    ]
    return "; ".join(filter(None, parts))


def source(device: str, record: dict[str, Any] | None) -> str:
    if record is None:
        return f"- {DEVICES[device]}: {NOT_MEASURED}"
    machine, versions = record["machine"], record["versions"]
    threads = f", {machine['threads']} threads" if device == "cpu" else ""
    return (
        f"- {DEVICES[device]}: {machine['name']}{threads}; PyTorch {versions['torch']}, Triton "
        f"{versions['triton']}; {record['date'][:10]}; "
        f"[every case](benchmarks/results/{device}/bench.md)"
    )


def table() -> str:
    records = {device: load(device) for device in DEVICES}
    lines = [source(device, record) for device, record in records.items()]
    lines += ["", "| case | CPU | GPU |", "|---|---|---|"]
    for device, record in records.items():
        found = {case["name"]: case for case in record["cases"]} if record else {}
        for name in cases_with_goals(device):
            cells = [cell(found.get(name)) if d == device else "" for d in DEVICES]
            lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines) + "\n"


def cases_with_goals(device: str) -> list[str]:
    every = [case for cases in FAMILIES.values() for case in cases(torch.device(device))]
    return [case.name for case in every if case.goals]


def updated(readme: str) -> str:
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
    print(f"{README.relative_to(ROOT)}: table of measurements written", file=sys.stderr)
