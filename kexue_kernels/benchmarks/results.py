"""What came of a case, as it is written to JSON."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["measured", "wrong", "error", "not installed", "left out", "not run"]
Verdict = Literal["met", "missed", "not measured"]

NO_TIME = "time limit"
ROWS = "share of rows"  # among errors: how many rows are not the right ones


@dataclass
class Measurement:
    """One contestant in one case. What was not measured is None."""

    name: str
    ours: bool
    status: Status = "not run"
    note: str = ""  # why there is no time
    errors: dict[str, dict[str, float | None]] = field(default_factory=dict)
    first_call_seconds: float | None = None  # loading and compiling included
    rounds: int = 0
    calls_per_round: int = 1
    seconds: float | None = None  # median of the rounds, per call
    quartiles: tuple[float, float] | None = None
    gb_per_second: float | None = None
    tflop_per_second: float | None = None
    copy_share: float | None = None  # bytes per second over the copy's
    roof_share: float | None = None  # the roof's time over this one
    peak_bytes: int | None = None  # beyond inputs, in one call
    speedup_over: dict[str, float] = field(default_factory=dict)  # ours: peer's time over this

    def rows_wrong(self) -> float | None:
        """The share of rows that are not the right ones, where that was counted."""
        return self.errors.get(ROWS, {}).get("error")

    def time(self, samples: Sequence[float], calls: int) -> None:
        self.status, self.note = "measured", ""
        self.rounds, self.calls_per_round = len(samples), calls
        self.seconds = statistics.median(samples)
        if len(samples) > 1:
            low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
            self.quartiles = (low, high)


@dataclass
class GoalResult:
    text: str
    verdict: Verdict
    measured: float | None  # in the goal's own unit
    by: str = ""  # the contestant that was judged


@dataclass
class CaseResult:
    name: str
    op: str
    direction: str
    shape: dict[str, int]
    dtype: str
    bytes: int
    flops: int
    counted: str
    result_bytes: int
    roof_seconds: float
    bound: str  # "memory" or "arithmetic": what sets the roof
    sweep: dict[str, str | int] | None = None
    status: Status = "measured"
    note: str = ""
    seconds: float = 0.0  # the whole case, checks included
    contestants: list[Measurement] = field(default_factory=list)
    goals: list[GoalResult] = field(default_factory=list)

    def best(self, kind: str = "") -> Measurement | None:
        """The fastest of ours, of those whose name ends so."""
        named = [m for m in self.contestants if m.ours and m.name.endswith(kind)]
        ours = [m for m in named if m.seconds is not None]
        return min(ours, key=lambda m: m.seconds or 0.0, default=None)

    def peer(self, name: str) -> Measurement | None:
        return next((m for m in self.contestants if m.name == name and not m.ours), None)

    def best_peer(self) -> Measurement | None:
        peers = [m for m in self.contestants if not m.ours and m.seconds is not None]
        return min(peers, key=lambda m: m.seconds or 0.0, default=None)
