"""Goals a case is held to. They are judged on the fastest of ours, or of a kind of ours."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from kexue_kernels.benchmarks.results import CaseResult, GoalResult, Measurement

Measure = Callable[[CaseResult, Measurement], float | None]


@dataclass(frozen=True)
class Goal:
    text: str
    measure: Measure  # from the case and the fastest of ours; None: not measured
    bound: float
    at_least: bool = True
    kind: str = ""  # how the names of those that are judged end

    def judge(self, result: CaseResult) -> GoalResult:
        best = result.best(self.kind)
        measured = None if best is None else self.measure(result, best)
        if best is None or measured is None:
            return GoalResult(self.text, "not measured", None)
        met = measured >= self.bound if self.at_least else measured <= self.bound
        return GoalResult(self.text, "met" if met else "missed", measured, best.name)


def of(kind: str, *goals: Goal) -> tuple[Goal, ...]:
    """Goals for one kind of ours, the one whose name ends so."""
    return tuple(replace(goal, kind=kind, text=f"{kind}: {goal.text}") for goal in goals)


def faster(peer: str, times: float) -> Goal:
    def measure(_: CaseResult, best: Measurement) -> float | None:
        return best.speedup_over.get(peer)

    text = f"ahead of {peer}" if times == 1 else f"at least {times:g}x {peer}"
    return Goal(text, measure, times)


def copy_share(share: float) -> Goal:
    def measure(_: CaseResult, best: Measurement) -> float | None:
        return best.copy_share

    return Goal(f"at least {share:.0%} of copy bandwidth", measure, share)


def microseconds(most: float) -> Goal:
    def measure(_: CaseResult, best: Measurement) -> float | None:
        return None if best.seconds is None else best.seconds * 1e6

    return Goal(f"at most {most:g} us a call", measure, most, at_least=False)


def scratch(tensor_bytes: int, tensors: float = 0.25) -> Goal:
    """Memory beyond inputs, outputs and gradients, in tensors of the case's size."""

    def measure(result: CaseResult, best: Measurement) -> float | None:
        if best.peak_bytes is None:
            return None
        return max(0.0, (best.peak_bytes - result.result_bytes) / tensor_bytes)

    text = f"beyond results at most {tensors:g} of a [B, L, D] tensor"
    return Goal(text, measure, tensors, at_least=False)


def elements_per_second(elements: int, least: float) -> Goal:
    def measure(_: CaseResult, best: Measurement) -> float | None:
        return None if best.seconds is None else elements / best.seconds

    return Goal(f"at least {least:.1e} elements/s", measure, least)


def leaner(peer: str, times: float) -> Goal:
    """Peak memory of a call beside a peer's."""

    def measure(result: CaseResult, best: Measurement) -> float | None:
        peaks = [m.peak_bytes for m in result.contestants if m.name == peer]
        if not peaks or not peaks[0] or best.peak_bytes is None:
            return None
        return best.peak_bytes / peaks[0]

    return Goal(f"at most {times:g}x {peer}'s peak memory", measure, times, at_least=False)


def matrix_share(share: float, kind: str = "") -> Goal:
    """Of the fastest of ours, or of those whose name ends in `kind`."""

    def measure(result: CaseResult, best: Measurement) -> float | None:
        judged = result.best(kind) if kind else best
        return judged.roof_share if judged and result.bound == "arithmetic" else None

    by = f" by {kind}" if kind else ""
    return Goal(f"at least {share:.0%} of the matrix rate{by}", measure, share)


def beside(kind: str, times: float) -> Goal:
    """The time beside that of another kind of ours."""

    def measure(result: CaseResult, best: Measurement) -> float | None:
        other = result.best(kind)
        if other is None or other.seconds is None or best.seconds is None:
            return None
        return best.seconds / other.seconds

    return Goal(f"at most {times:g}x the time of {kind}", measure, times, at_least=False)


def megabytes(most: float) -> Goal:
    def measure(_: CaseResult, best: Measurement) -> float | None:
        return None if best.peak_bytes is None else best.peak_bytes / 1e6

    return Goal(f"at most {most:g} MB beyond inputs", measure, most, at_least=False)


def no_rows_wrong() -> Goal:
    def measure(_: CaseResult, best: Measurement) -> float | None:
        return best.rows_wrong()

    return Goal("0 rows wrong", measure, 0.0, at_least=False)
