# SPDX-License-Identifier: Apache-2.0
"""Draws a result: a chart for each kind of workload, a bar for each set-up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kmap.bench.figures import Outcome
from kmap.results import CannotRun, UsageError

SUFFIXES = (".svg", ".png", ".pdf")
_COLOURS = {
    "tcp": "#4c566a",
    "kernel": "#4c566a",
    "unix": "#5e81ac",
    "pipe": "#88c0d0",
    "fifo": "#8fbcbb",
    "kmap": "#d08770",
    "kmap-pipe": "#ebcb8b",
    "kmap-fifo": "#bf616a",
    "ring": "#b48ead",
}


@dataclass(frozen=True)
class _Chart:
    title: str
    axis: str
    prefix: str
    metric: str


_CHARTS = (
    _Chart("round trip, one CPU", "p50, us", "pingpong-*-1cpu", "p50_us"),
    _Chart("round trip, two CPUs", "p50, us", "pingpong-*-2cpu", "p50_us"),
    _Chart("stream", "CPU s/GB, both ends", "stream-*", "cpu_s_per_gb"),
    _Chart("stream", "bytes/s", "stream-*", "bytes_per_s"),
    _Chart("requests", "CPU us per request", "fanin-*", "cpu_us_per_message"),
    _Chart("a connection each", "CPU us per request", "churn-*", "cpu_us_per_message"),
    _Chart("applications", "CPU us per message", "", "cpu_us_per_message"),
)
_KINDS = ("pingpong", "stream", "fanin", "churn", "idle")


def check(path: Path) -> None:
    """Better now than after the measurement."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--plot {path}: the name ends with {', '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--plot {path}: {path.absolute().parent} does not exist")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise CannotRun(
            "--plot needs matplotlib: pip install 'kmap[bench]' (in the source tree, "
            "pip install '.[bench]')"
        ) from None


def _shown(chart: _Chart, outcomes: Sequence[Outcome]) -> list[Outcome]:
    import fnmatch

    found = []
    for outcome in outcomes:
        if chart.prefix:
            fits = fnmatch.fnmatch(outcome.workload, chart.prefix)
        else:
            fits = outcome.workload.split("-")[0] not in _KINDS
        if fits and any(chart.metric in row.metrics for row in outcome.rows):
            found.append(outcome)
    return found


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Writes the picture; medians with the range of the rounds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    charts = [(chart, _shown(chart, outcomes)) for chart in _CHARTS]
    charts = [(chart, shown) for chart, shown in charts if shown]
    if not charts:
        raise UsageError("--plot: there is nothing to draw in what was measured")
    figure = Figure(figsize=(11, 3.2 * len(charts)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(charts), 1, squeeze=False)[:, 0]
    for axis, (chart, shown) in zip(axes, charts, strict=True):
        setups = list(
            dict.fromkeys(row.setup for outcome in shown for row in outcome.rows)
        )
        width = 0.8 / len(setups)
        for place, setup in enumerate(setups):
            at, medians, errors = [], [], ([], [])  # type: ignore[var-annotated]
            for number, outcome in enumerate(shown):
                row = outcome.row(setup)
                spread = row.metrics.get(chart.metric) if row else None
                if spread is None:
                    continue
                at.append(number + (place - (len(setups) - 1) / 2) * width)
                medians.append(spread.median)
                errors[0].append(spread.median - spread.low)
                errors[1].append(spread.high - spread.median)
            colour = _COLOURS.get(setup, "#a3be8c")
            axis.bar(
                at,
                medians,
                width,
                yerr=errors,
                label=setup,
                color=colour,
                error_kw={"linewidth": 0.7},
            )
        # Set-ups lie orders of magnitude apart.
        axis.set_yscale("log")
        axis.set_ylabel(chart.axis)
        axis.set_title(chart.title, loc="left", fontsize=10)
        names = [outcome.workload for outcome in shown]
        axis.set_xticks(range(len(names)), names, rotation=15, fontsize=8)
        axis.legend(fontsize=8, ncols=len(setups))
        axis.grid(axis="y", linewidth=0.3)
    figure.savefig(path)
