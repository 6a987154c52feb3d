"""PNG plots of a run: one per sweep, and one of every case beside the roof."""

import importlib.util
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = Mapping[str, Any]
Rate = Callable[[Record, Record], float]  # of a case and one of its contestants

OURS = ("#c0392b", "#e67e22", "#8e44ad")
PEERS = ("#5d6d7e", "#85929e", "#aeb6bf", "#7f8c8d", "#95a5a6", "#bdc3c7")
MARKERS = "osD^v<>"


def draw(record: Record, out: pathlib.Path) -> tuple[list[str], str]:
    """File names of what was drawn into `out`, or why nothing was."""
    if importlib.util.find_spec("matplotlib") is None:
        return [], "matplotlib is not installed"
    styles = _styles(record)
    curves = [title for title, cases in _sweeps(record).items() if len(cases) > 1]
    drawn = [_sweep(record, title, styles, out) for title in curves]
    if any(_timed(case) for case in record["cases"]):
        drawn.append(_overview(record, styles, out))
    return drawn, ""


def _sweep(record: Record, title: str, styles: dict[str, dict[str, Any]], out: pathlib.Path) -> str:
    """The rate against the axis, and the peak memory."""
    from matplotlib.ticker import LogFormatter

    cases = sorted(_sweeps(record)[title], key=lambda case: case["sweep"]["value"])
    figure, (rates, memory) = _figure(13, 5, panels=2)
    rate_of, unit, limit, what = _scale(record, cases)
    _curves(rates, cases, styles, rate_of)
    if limit is not None:
        rates.axhline(limit, color="black", linestyle="--", linewidth=1, label=what)
    _curves(memory, cases, styles, lambda _, m: (m["peak_bytes"] or 0) / 2**20)
    axis = cases[0]["sweep"]["axis"]
    values = [case["sweep"]["value"] for case in cases]
    for axes, label in ((rates, unit), (memory, "peak memory beyond the inputs, MiB")):
        axes.set(xscale="log", yscale="log", xlabel=f"{_AXES[axis]} {axis}", ylabel=label)
        axes.set_xticks(values, [str(value) for value in values])
        axes.xaxis.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter())
    figure.suptitle(f"{title}\n{_where(record)}", fontsize=10)
    return _save(figure, (rates, memory), out / f"{_slug(title)}.png")


def _curves(
    axes: "Axes", cases: list[Record], styles: dict[str, dict[str, Any]], value_of: Rate
) -> None:
    """A curve for each contestant; what is zero has no place on a logarithmic axis."""
    for name, style in styles.items():
        found = [
            (case["sweep"]["value"], value_of(case, m))
            for case in cases
            for m in _timed(case)
            if m["name"] == name
        ]
        points = [(x, y) for x, y in found if y > 0]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, **style)


def _scale(record: Record, cases: list[Record]) -> tuple[Rate, str, float | None, str]:
    """What a sweep's curves show: the rate, its unit, its limit here and the limit's name.

    That is what a call makes, where the sweep says so; else the arithmetic where it sets the roof
    of every case, else the bytes.
    """
    if made := cases[0]["sweep"].get("made"):
        return lambda case, m: case["sweep"]["per_call"] / m["seconds"], f"{made}/s", None, ""
    if all(case["bound"] == "arithmetic" for case in cases):
        limit = cases[0]["flops"] / cases[0]["roof_seconds"] / 1e12
        return lambda _, m: m["tflop_per_second"], "TFLOP/s", limit, "matrix rate"
    limit = record["roof"]["copy_bytes_per_second"] / 1e9
    return lambda _, m: m["gb_per_second"], "GB/s", limit, "copy bandwidth"


def _overview(record: Record, styles: dict[str, dict[str, Any]], out: pathlib.Path) -> str:
    """Share of the roof, a row per case."""
    cases = [case for case in record["cases"] if _timed(case)][::-1]
    figure, (axes,) = _figure(10, 1.5 + 0.34 * len(cases))
    for name, style in styles.items():
        points = [
            (100 * m["roof_share"], row)
            for row, case in enumerate(cases)
            for m in _timed(case)
            if m["name"] == name
        ]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, **style | {"linestyle": "none"})
    axes.axvline(100, color="black", linestyle="--", linewidth=1)
    axes.set(xscale="log", xlabel="share of the roof, %")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(cases)), [case["name"] for case in cases], fontsize=8)
    axes.set_title(_where(record), fontsize=10)
    return _save(figure, (axes,), out / "overview.png")


_AXES = {
    "L": "length",
    "D": "channels",
    "N": "rows",
    "K": "codes",
    "n": "width",
    "k": "blocks",
}


def _figure(width: float, height: float, panels: int = 1) -> tuple[Any, tuple["Axes", ...]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, tuple(figure.subplots(1, panels, squeeze=False)[0])


def _save(figure: Any, panels: tuple["Axes", ...], path: pathlib.Path) -> str:
    for axes in panels:
        axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path.name


def _styles(record: Record) -> dict[str, dict[str, Any]]:
    """A contestant's look, the same in every plot; ours last, on top."""
    found: dict[bool, list[str]] = {False: [], True: []}
    for case in record["cases"]:
        for m in _timed(case):
            if m["name"] not in found[m["ours"]]:
                found[m["ours"]].append(m["name"])
    styles = {}
    for ours, colours, width in ((False, PEERS, 1.2), (True, OURS, 2.4)):
        for number, name in enumerate(found[ours]):
            styles[name] = {
                "color": colours[number % len(colours)],
                "marker": MARKERS[number % len(MARKERS)],
                "linewidth": width,
                "markersize": 7 if ours else 5,
                "zorder": 3 if ours else 2,
            }
    return styles


def _sweeps(record: Record) -> dict[str, list[Record]]:
    """Timed cases by sweep."""
    found: dict[str, list[Record]] = {}
    for case in record["cases"]:
        if case["sweep"] is not None and _timed(case):
            found.setdefault(case["sweep"]["title"], []).append(case)
    return found


def _timed(case: Record) -> list[Record]:
    return [m for m in case["contestants"] if m["seconds"] is not None]


def _where(record: Record) -> str:
    machine = record["machine"]
    threads = f", {machine['threads']} threads" if machine["device"] == "cpu" else ""
    return f"{machine['name']}{threads}, torch {record['versions']['torch']}, {record['date'][:10]}"


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
