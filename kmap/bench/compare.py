# SPDX-License-Identifier: Apache-2.0
"""Holds two results against each other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from kmap.bench import figures
from kmap.bench.figures import METRICS, Outcome, Row, Spread
from kmap.results import EXIT_FAILED, EXIT_OK, JsonObject, UsageError

SCHEMA = "kmap.bench.compare/1"
# A change counts when the ranges lie apart and the medians by more than this.
_LEAST = 0.05
_COMPARED = (
    "p50_us",
    "p99_us",
    "messages_per_s",
    "bytes_per_s",
    "cpu_us_per_message",
    "cpu_s_per_gb",
    "wakeups_per_mb",
)
# System calls have no spread; less than this each is how the ends met.
_CALLS_LEAST = 0.02


@dataclass(frozen=True)
class Change:
    """One figure in both results."""

    workload: str
    setup: str
    metric: str
    before: Spread
    after: Spread
    # "better", "worse" or "same".
    verdict: str

    @property
    def ratio(self) -> float | None:
        """After divided by before."""
        return self.after.median / self.before.median if self.before.median else None


@dataclass(frozen=True)
class Comparison:
    """Everything that both results have."""

    files: tuple[str, str]
    changes: tuple[Change, ...]
    same: int
    # Workloads and set-ups that only one of them has.
    only: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """1 when a figure got worse."""
        worse = any(change.verdict == "worse" for change in self.changes)
        return EXIT_FAILED if worse else EXIT_OK

    def to_json(self) -> JsonObject:
        """One document."""
        return {
            "schema": SCHEMA,
            "ok": self.exit_code == EXIT_OK,
            "files": list(self.files),
            "changes": [
                {**asdict(change), "ratio": change.ratio} for change in self.changes
            ],
            "same": self.same,
            "only": list(self.only),
        }


def load(path: Path) -> tuple[Outcome, ...]:
    """The workloads of a file that --json wrote."""
    try:
        document = json.loads(path.read_text())
        if document["schema"] != "kmap.bench/1":
            raise UsageError(
                f"{path} has schema {document['schema']}, not kmap.bench/1: make it "
                "with kmap bench --json"
            )
        return tuple(map(figures.outcome_from_json, document["workloads"]))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} is no result of kmap bench --json ({error!r})"
        ) from error


def _verdict(
    before: Spread, after: Spread, higher_is_better: bool, least: float
) -> str:
    apart = after.low > before.high or after.high < before.low
    if not apart or abs(after.median - before.median) <= least:
        return "same"
    return "better" if (after.median > before.median) == higher_is_better else "worse"


def _row_changes(workload: str, before: Row, after: Row) -> Iterator[Change]:
    for name in _COMPARED:
        old, new = before.metrics.get(name), after.metrics.get(name)
        if old is not None and new is not None:
            higher = METRICS[name].higher_is_better
            verdict = _verdict(old, new, higher, _LEAST * abs(old.median))
            yield Change(workload, before.setup, name, old, new, verdict)
    if before.calls is not None and after.calls is not None:
        old, new = (
            Spread(each.per_message, each.per_message, each.per_message)
            for each in (before.calls, after.calls)
        )
        least = max(_CALLS_LEAST, _LEAST * old.median)
        verdict = _verdict(old, new, False, least)
        yield Change(workload, before.setup, "calls_per_message", old, new, verdict)


def compare(before: Path, after: Path) -> Comparison:
    """What changed from one to the other."""
    rows = [
        {
            (outcome.workload, row.setup): row
            for outcome in load(path)
            for row in outcome.rows
        }
        for path in (before, after)
    ]
    changes: list[Change] = []
    for key in rows[0]:
        if key in rows[1]:
            changes += _row_changes(key[0], rows[0][key], rows[1][key])
    if not changes:
        raise UsageError(f"{before} and {after} have nothing in common")
    return Comparison(
        files=(str(before), str(after)),
        changes=tuple(change for change in changes if change.verdict != "same"),
        same=sum(change.verdict == "same" for change in changes),
        only=tuple(" ".join(key) for key in sorted(rows[0].keys() ^ rows[1].keys())),
    )
