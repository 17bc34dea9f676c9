# SPDX-License-Identifier: Apache-2.0
"""What a table of a workload shows, on a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kmap.bench.figures import Outcome, Row, Spread
from kmap.bench.goals import Judged


def number(value: float) -> str:
    """Three digits, and a unit where there are many more."""
    if value == 0:
        return "0"
    if abs(value) >= 1e9:
        return f"{value / 1e9:.2f} G"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.2f} M"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def cell(spread: Spread | None, *, ranged: bool = True) -> str:
    """The median and the range."""
    if spread is None:
        return ""
    if not ranged or spread.low == spread.high:
        return number(spread.median)
    return f"{number(spread.median)} ({number(spread.low)}-{number(spread.high)})"


_COLUMNS = {
    "pingpong": ("p50_us", "p99_us", "cpu_us_per_message"),
    "stream": ("bytes_per_s", "cpu_s_per_gb", "wakeups_per_mb"),
    "idle": ("cpu_s", "sleeps"),
    "": ("messages_per_s", "p50_us", "p99_us", "cpu_us_per_message"),
}
HEADINGS = {
    "p50_us": "p50 us",
    "p99_us": "p99 us",
    "cpu_us_per_message": "CPU us/message",
    "bytes_per_s": "bytes/s",
    "cpu_s_per_gb": "CPU s/GB",
    "wakeups_per_mb": "wake-ups/MB",
    "messages_per_s": "messages/s",
    "cpu_s": "CPU s",
    "sleeps": "wake-ups",
}


def columns(outcome: Outcome) -> tuple[str, ...]:
    """The metrics that a workload is about; the ratio is of the last but tails."""
    kind = outcome.workload.split("-")[0]
    names = _COLUMNS.get(kind, _COLUMNS[""])
    if kind == "iperf3":
        names = _COLUMNS["stream"]
    return tuple(
        name for name in names if any(name in row.metrics for row in outcome.rows)
    )


def ratio_metric(outcome: Outcome) -> str:
    """What the last column compares."""
    kind = outcome.workload.split("-")[0]
    if kind in ("stream", "iperf3"):
        return "cpu_s_per_gb"
    return "p50_us" if kind == "pingpong" else "cpu_us_per_message"


def calls(row: Row) -> str:
    """System calls per message."""
    return "" if row.calls is None else number(round(row.calls.per_message, 3))


def notes(outcome: Outcome) -> list[str]:
    """What a reader has to know of a workload's figures."""
    found = [f"{name} {version}" for name, version in outcome.versions.items()]
    if outcome.discarded:
        found.append(f"{outcome.discarded} rounds discarded for steal time")
    if outcome.foreign > 0.1:
        found.append(f"other programs used {outcome.foreign:.0%} of these CPUs")
    return found


def _markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def markdown(outcomes: Sequence[Outcome], judged: Sequence[Judged]) -> str:
    """A table for each group of workloads with the same columns, and the goals."""
    groups: dict[tuple[tuple[str, ...], str], list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.rows:
            key = (columns(outcome), ratio_metric(outcome))
            groups.setdefault(key, []).append(outcome)
    lines: list[str] = []
    for (names, compared), members in groups.items():
        base = "TCP"
        heads = ["workload", "set-up", *(HEADINGS[name] for name in names)]
        heads += ["calls/message", f"{HEADINGS[compared]} / {base}"]
        rows = []
        for outcome in members:
            for number_, row in enumerate(outcome.rows):
                cells = [cell(row.metrics.get(name)) for name in names]
                ratio = cell(row.ratios.get(compared))
                name = f"`{outcome.workload}`" if number_ == 0 else ""
                rows.append([name, row.setup, *cells, calls(row), ratio])
        lines += [*_markdown_table(heads, rows), ""]
    for outcome in outcomes:
        if outcome.cannot_run:
            lines += [f"`{outcome.workload}` cannot run: {outcome.cannot_run}", ""]
    rows = [
        [
            goal.text + (f" ({goal.note})" if goal.note else ""),
            number(goal.value or 0),
            f"{goal.relation} {number(goal.limit)}",
            "yes" if goal.reached else "**no**",
        ]
        for goal in judged
    ]
    lines += _markdown_table(["goal", "measured", "limit", "reached"], rows)
    return "\n".join(lines) + "\n"
