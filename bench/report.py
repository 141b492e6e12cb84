"""What was measured: medians, ratios, verdicts; as a table, as JSON, as a picture."""

import json
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from math import inf, isnan, nan
from pathlib import Path
from statistics import median
from subprocess import run
from textwrap import fill
from typing import Any, Literal

from bench.peers import PACKAGES, WAVE, Missing, find_program
from wave_proxy import __version__

Verdict = Literal["held", "missed", "not measured"]


@dataclass(frozen=True)
class Goal:
    """What DESIGN.md §8 asks of our figure, or with ``versus`` of its ratio to that peer's."""

    rule: Literal["at least", "at most"]
    bound: float
    versus: str = ""


@dataclass(frozen=True)
class Result:
    """One kind of figure, by server and round; ``ours`` is the series that goals are about."""

    scenario: str
    work: str
    unit: str
    figures: Mapping[str, Sequence[float]]
    goals: Sequence[Goal] = ()
    ours: str = WAVE
    missing: Mapping[str, str] = field(default_factory=dict)  # server: why
    notes: Sequence[str] = ()

    def ratio(self, peer: str) -> float:
        """The median over the rounds of our figure by the peer's; NaN where one of them has no figures."""
        pairs = zip(self.figures.get(self.ours, ()), self.figures.get(peer, ()), strict=False)
        ratios = [_divide(ours, theirs) for ours, theirs in pairs]
        return median(ratios) if ratios else nan

    def judge(self, goal: Goal) -> Verdict:
        """Whether the goal is held."""
        ours = self.figures.get(self.ours, ())
        value = self.ratio(goal.versus) if goal.versus else median(ours) if ours else nan
        if isnan(value):
            return "not measured"
        held = value >= goal.bound if goal.rule == "at least" else value <= goal.bound
        return "held" if held else "missed"


def _divide(ours: float, theirs: float) -> float:
    if theirs:
        return ours / theirs
    return inf if ours else 1.0


# --- the table -------------------------------------------------------------------------------------------------------

_HEAD = ("work", "server", "median", "least – most", "ours ÷ it", "held to", "")


def table(results: Sequence[Result]) -> str:
    """A table in Markdown, and under it what else there is to say."""
    rows = [_HEAD, *(row for result in results for row in _rows(result))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, _line(["-" * width for width in widths], widths))
    notes = [f"- {result.work}: {note}" for result in results for note in result.notes]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return f"| {' | '.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))} |"


def _rows(result: Result) -> Iterator[tuple[str, ...]]:
    title = f"{result.work} ({result.unit})"
    for server, values in result.figures.items():
        goals = [goal for goal in result.goals if goal.versus == ("" if server == result.ours else server)]
        ratio = "" if server == result.ours else f"{number(result.ratio(server))} ×"
        told = ", ".join(_bound(goal) for goal in goals)
        verdicts = ", ".join(result.judge(goal) for goal in goals)
        spread = f"{number(min(values))} – {number(max(values))}"
        yield title, server, number(median(values)), spread, ratio, told, verdicts
        title = ""
    for server, why in result.missing.items():
        goals = [goal for goal in result.goals if goal.versus == server]
        yield title, server, "missing", why, "", ", ".join(_bound(goal) for goal in goals), "not measured" * bool(goals)
        title = ""


def _bound(goal: Goal) -> str:
    sign = "≥" if goal.rule == "at least" else "≤"
    return f"{sign} {number(goal.bound)}{' ×' if goal.versus else ''}"


def number(value: float) -> str:
    """Three figures that count, thousands apart: ``48,200``, ``1.13``, ``0.0042``."""
    if value >= 1000 and value != inf:
        digits = len(str(int(value))) - 3
        return f"{round(value, -digits):,.0f}"
    return f"{value:.3g}"


# --- the machine -----------------------------------------------------------------------------------------------------

_VERSIONS = {"nginx": "-v", "wrk": "-v", "docker-registry": "--version"}


def describe_machine() -> dict[str, str]:
    """What the figures depend on, by name."""
    folder = Path(__file__).parent.parent
    done = run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": f"{os.cpu_count()} × {_find_in('/proc/cpuinfo', r'model name[^:]*: (.*)') or platform.machine()}",
        "memory": f"{int(_find_in('/proc/meminfo', r'MemTotal: +([0-9]+)') or 0) / 1e6:.0f} GB",
        "load before": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "kernel": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "wave-proxy": f"{__version__} {done.stdout.strip()}".strip(),
        **{name: _version(name) for name in PACKAGES},
    }


def _find_in(file: str, pattern: str) -> str:
    with suppress(OSError):
        found = re.search(pattern, Path(file).read_text())
        return found[1] if found else ""
    return ""


def _version(name: str) -> str:
    try:
        command = [find_program(name), _VERSIONS[name]]
    except Missing:
        return "missing"
    done = run(command, capture_output=True, text=True)
    found = re.search(r"\d+(\.\d+)+\S*", done.stdout + done.stderr)
    return found[0] if found else "unknown"


# --- files -----------------------------------------------------------------------------------------------------------


def to_json(results: Sequence[Result], machine: Mapping[str, str], settings: Mapping[str, Any]) -> str:
    """Everything that is known, for other programs."""
    return json.dumps(
        {"machine": machine, "settings": settings, "results": [_document(result) for result in results]},
        indent=2,
        ensure_ascii=False,
    )


def _document(result: Result) -> dict[str, Any]:
    medians = {server: median(values) for server, values in result.figures.items()}
    ratios = {server: result.ratio(server) for server in result.figures if server != result.ours}
    goals = [{**asdict(goal), "verdict": result.judge(goal)} for goal in result.goals]
    finite = {server: ratio for server, ratio in ratios.items() if ratio != inf}  # JSON has no infinity
    return {**asdict(result), "medians": medians, "ratios": finite, "goals": goals}


_COLUMNS = 2
_TITLE_WIDTH = 85
_REACH = 2.5  # of the longest bar
_LEGEND = "bars: medians, with the least and the most; a line: what our bar is held to, red where it is missed"


def has_matplotlib() -> bool:
    """Whether plot() can draw."""
    try:
        import matplotlib  # noqa: F401 (an extra: heavy, and only the picture needs it)
    except ImportError:
        return False
    return True


def plot(results: Sequence[Result], machine: Mapping[str, str], file: Path) -> None:
    """Draw what was compared as bars, a panel each, and under them what was not as text; the suffix is the format.

    Needs has_matplotlib(). Raises OSError, and ValueError for a format that is not known.
    """
    from matplotlib.figure import Figure

    compared = [result for result in results if len(result.figures) > 1]
    single = [result for result in results if len(result.figures) == 1]
    rows = [compared[start : start + _COLUMNS] for start in range(0, len(compared), _COLUMNS)]
    # Bars are as high in one row as in another, and a line of text is lower.
    heights = [max(len(result.figures) for result in row) + 1.6 for row in rows]
    heights += [(len(single) + 1) * 0.75] if single else []
    figure = Figure(figsize=(7.5 * _COLUMNS, 0.3 * sum(heights) + 0.5), layout="constrained")
    grid = figure.add_gridspec(len(heights), _COLUMNS, height_ratios=heights)
    for number, row in enumerate(rows):
        for column, result in enumerate(row):
            _draw(figure.add_subplot(grid[number, column]), result)
    if single:
        _write(figure.add_subplot(grid[len(rows), :]), single)
    told = f"wave-proxy {machine['wave-proxy']} on {machine['processor']}, {machine['date']}"
    figure.suptitle(f"{told}\n{_LEGEND}", fontsize=9)
    figure.savefig(file)


def _draw(axis: Any, result: Result) -> None:
    servers = list(result.figures)
    medians = [median(result.figures[server]) for server in servers]
    below = [value - min(result.figures[server]) for value, server in zip(medians, servers, strict=True)]
    above = [max(result.figures[server]) - value for value, server in zip(medians, servers, strict=True)]
    colours = ["tab:blue" if server == result.ours else "silver" for server in servers]
    bars = axis.barh(servers, medians, xerr=[below, above], color=colours, ecolor="dimgray", capsize=2)
    # One round that went wrong shall not press all bars flat.
    reach = min(max(value + more for value, more in zip(medians, above, strict=True)), _REACH * max(medians)) or 1.0
    # Behind the whiskers, which else would run through the figures.
    ends = [min(value + more, reach) for value, more in zip(medians, above, strict=True)]
    for bar, value, end in zip(bars, medians, ends, strict=True):
        place, box = (end, bar.get_y() + bar.get_height() / 2), {"color": "white", "pad": 0.5}
        axis.annotate(number(value), place, (5, 0), "data", "offset points", va="center", size=8, bbox=box)
    axis.set_title(fill(f"{result.work} ({result.unit})", _TITLE_WIDTH), loc="left", fontsize=9)
    axis.set_xlim(0, reach * 1.15)
    axis.invert_yaxis()
    axis.tick_params(labelsize=8)
    axis.xaxis.set_major_formatter(lambda value, _: number(value))
    axis.spines[["top", "right"]].set_visible(False)
    _draw_goals(axis, result)


def _draw_goals(axis: Any, result: Result) -> None:
    """A line where each goal is: what our bar has to reach, or not to pass."""
    for goal in result.goals:
        at = goal.bound * (median(result.figures[goal.versus]) if goal.versus in result.figures else not goal.versus)
        if not 0 < at <= axis.get_xlim()[1]:
            continue  # of a peer that is missing, or far beyond the bars
        held = result.judge(goal) == "held"
        place = list(result.figures).index(result.ours)
        axis.plot([at, at], [place - 0.5, place + 0.5], color="tab:green" if held else "tab:red", linewidth=2)


def _write(axis: Any, results: Sequence[Result]) -> None:
    axis.set_axis_off()
    for line, result in enumerate(results):
        (values,) = result.figures.values()
        told = ", ".join(f"held to {_bound(goal)}: {result.judge(goal)}" for goal in result.goals)
        missed = any(result.judge(goal) == "missed" for goal in result.goals)
        place, colour = 1 - (line + 1) / (len(results) + 1), "tab:red" if missed else "black"
        cells = (0.0, f"{result.work} ({result.unit})"), (0.64, number(median(values))), (0.72, told)
        for left, text in cells:
            axis.text(left, place, text, fontsize=8, color=colour, va="center", transform=axis.transAxes)
