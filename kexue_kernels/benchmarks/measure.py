"""One case: check every contestant, then time the right ones in turn."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from kexue_kernels.benchmarks import check
from kexue_kernels.benchmarks.case import Bound, Case, Gate
from kexue_kernels.benchmarks.clock import Clock
from kexue_kernels.benchmarks.results import NO_TIME, CaseResult, Measurement
from kexue_kernels.benchmarks.roof import Roof, short

STEP_SECONDS = 30e-6  # a guess at one Python-level step of a reference, forward


@dataclass(frozen=True)
class Effort:
    """How long a case is timed. The budget is shared out between its contestants."""

    seconds: float
    least_rounds: int
    most_rounds: int
    slow_too: bool = True  # whether slow contestants take part


FULL = Effort(seconds=8.0, least_rounds=5, most_rounds=100)
QUICK = Effort(seconds=0.8, least_rounds=3, most_rounds=30, slow_too=False)


def silent(_: str) -> None:
    pass


@dataclass(frozen=True)
class Stage:
    """Where and how cases run. No call starts after `deadline` (on time.monotonic's clock)."""

    device: torch.device
    roof: Roof
    clock: Clock
    effort: Effort
    deadline: float = float("inf")
    say: Callable[[str], None] = silent

    def late(self, seconds: float = 0.0) -> bool:
        return time.monotonic() + seconds > self.deadline


@dataclass
class Entrant:
    """A contestant that passed the check."""

    bound: Bound
    measurement: Measurement
    once: float  # seconds of a warm call, by the wall
    repeats: int
    samples: list[float] = field(default_factory=list)
    spent: float = 0.0


def estimate(case: Case, roof: Roof, effort: Effort) -> float:
    """Seconds that a case may take, before anything of it has run."""
    calls = effort.least_rounds + 4  # of the slowest: truth, plain, check, memory
    steps = case.steps * STEP_SECONDS * (1 if case.direction == "forward" else 5)
    at_best, _ = roof.seconds(case.bytes, case.flops, case.matrix_dtype)
    return effort.seconds + calls * (steps + 10 * at_best)


def measure(case: Case, stage: Stage) -> CaseResult:
    result = blank(case, stage.roof)
    start = time.monotonic()
    try:
        _compete(case, result, stage)
    except Exception as error:  # the reference itself failed: nothing to judge by
        result.status, result.note = "error", told(error)
        for measurement in result.contestants:
            measurement.note = "the reference failed"
    if stage.device.type == "cuda":
        torch.cuda.empty_cache()
    result.goals = [goal.judge(result) for goal in case.goals]
    result.seconds = time.monotonic() - start
    return result


def blank(case: Case, roof: Roof, note: str = "") -> CaseResult:
    """A case's result before it ran; with a note, that of one that does not run."""
    seconds, bound = roof.seconds(case.bytes, case.flops, case.matrix_dtype)
    result = CaseResult(
        name=case.name,
        op=case.op,
        direction=case.direction,
        shape=dict(case.shape),
        dtype=short(case.dtype),
        bytes=case.bytes,
        flops=case.flops,
        counted=case.counted,
        result_bytes=case.result_bytes,
        roof_seconds=seconds,
        bound=bound,
        sweep=None if case.sweep is None else case.sweep._asdict(),
        contestants=[Measurement(c.name, c.ours, note=note) for c in case.contestants],
    )
    if note:
        result.status, result.note = "not run", note
        result.goals = [goal.judge(result) for goal in case.goals]
    return result


def _compete(case: Case, result: CaseResult, stage: Stage) -> None:
    inputs, grad = case.make(stage.device), case.cotangent(stage.device)
    stage.say("reference")
    gate: Gate = case.gate or check
    expected = gate.expect(case, inputs, grad)
    entrants = []
    for contestant, measurement in zip(case.contestants, result.contestants, strict=True):
        stage.say(contestant.name)
        if absence := contestant.absence():
            measurement.status, measurement.note = absence
            continue
        if contestant.slow and not stage.effort.slow_too:
            measurement.status, measurement.note = "left out", "slow, so not in a quick run"
            continue
        if stage.late():
            measurement.note = NO_TIME
            continue
        start = time.monotonic()
        try:
            bound = Bound(contestant, case.direction, inputs, grad)
            entrants += _admit(bound, gate, expected, measurement, stage, start)
        except Exception as error:  # theirs to raise, ours to record
            measurement.status, measurement.note = "error", told(error)
    del expected
    stage.say("timing")
    _interleave(entrants, stage)
    for entrant in entrants:
        if entrant.samples and entrant.measurement.status != "error":
            entrant.measurement.time(entrant.samples, entrant.repeats)
            _derive(entrant.measurement, case, result, stage.roof)
    _compare(result)


def _admit(
    bound: Bound,
    gate: Gate,
    expected: Any,
    measurement: Measurement,
    stage: Stage,
    start: float,
) -> list[Entrant]:
    """Check one contestant: an entrant, or none where it is wrong."""
    found = bound.results()
    measurement.errors, wrong = gate.judge(found, expected)
    measurement.first_call_seconds = time.monotonic() - start
    if wrong and not bound.contestant.approximate:
        measurement.status, measurement.note = "wrong", wrong
        return []
    del found
    measurement.note = NO_TIME
    if stage.late(measurement.first_call_seconds):
        return []
    once = stage.clock.once(bound.call)  # warm: nothing is loaded or compiled below
    measurement.peak_bytes = stage.clock.peak_bytes(bound.call)
    return [Entrant(bound, measurement, once, stage.clock.repeats(once))]


def _interleave(entrants: list[Entrant], stage: Stage) -> None:
    """Rounds in which everyone has a turn; who has used up its share sits out after a few."""
    effort = stage.effort
    share = effort.seconds / max(1, len(entrants))
    for done in range(effort.most_rounds):
        turns = [e for e in entrants if done < effort.least_rounds or e.spent < share]
        turns = [e for e in turns if not stage.late(e.once * e.repeats)]
        for entrant in turns[done % len(turns) :] + turns[: done % len(turns)] if turns else []:
            start = time.monotonic()
            try:
                seconds = stage.clock.sample(entrant.bound.call, entrant.repeats)
            except Exception as error:
                entrant.measurement.status, entrant.measurement.note = "error", told(error)
                entrants.remove(entrant)
                continue
            entrant.samples.append(seconds)
            entrant.spent += time.monotonic() - start


def _derive(measurement: Measurement, case: Case, result: CaseResult, roof: Roof) -> None:
    """Rates and shares, from the median."""
    assert measurement.seconds is not None
    rate = case.bytes / measurement.seconds
    measurement.gb_per_second = rate / 1e9
    measurement.tflop_per_second = case.flops / measurement.seconds / 1e12
    measurement.copy_share = rate / roof.copy_bytes_per_second
    measurement.roof_share = result.roof_seconds / measurement.seconds


def _compare(result: CaseResult) -> None:
    timed = {m.name: m.seconds for m in result.contestants if m.seconds is not None and not m.ours}
    for ours in result.contestants:
        if ours.ours and ours.seconds is not None:
            ours.speedup_over = {peer: seconds / ours.seconds for peer, seconds in timed.items()}


def told(error: BaseException) -> str:
    """An error in a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
