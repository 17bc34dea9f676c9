# SPDX-License-Identifier: Apache-2.0
"""What one run gives, and what many runs of a workload come to."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kmap.results import JsonObject

GB, MB = 1e9, 1e6


@dataclass(frozen=True)
class Sample:
    """One run of one set-up."""

    setup: str
    round: int
    messages: int
    bytes: int
    elapsed_s: float
    # Of both ends, in the measured window.
    cpu_s: float
    server_cpu_s: float
    client_cpu_s: float
    # Times that a process gave up its CPU to wait; None where nobody counted.
    sleeps: int | None
    p50_us: float | None
    p99_us: float | None
    # Of the bytes, as the library counted them; None without Kmap.
    ring_share: float | None
    # Of the CPUs of the run: what the hypervisor and other programs took.
    steal: float
    foreign: float


@dataclass(frozen=True)
class Metric:
    """A number that a run has, and which way is better."""

    name: str
    unit: str
    higher_is_better: bool
    of: Callable[[Sample], float | None]


def _per(value: float | None, count: float) -> float | None:
    return None if value is None or not count else value / count


METRICS = {
    metric.name: metric
    for metric in (
        Metric("p50_us", "us", False, lambda s: s.p50_us),
        Metric("p99_us", "us", False, lambda s: s.p99_us),
        Metric("messages_per_s", "/s", True, lambda s: _per(s.messages, s.elapsed_s)),
        Metric("bytes_per_s", "B/s", True, lambda s: _per(s.bytes, s.elapsed_s)),
        Metric(
            "cpu_us_per_message",
            "us",
            False,
            lambda s: _per(s.cpu_s * 1e6, s.messages),
        ),
        Metric("cpu_s_per_gb", "s/GB", False, lambda s: _per(s.cpu_s, s.bytes / GB)),
        Metric("messages_per_cpu_s", "/s", True, lambda s: _per(s.messages, s.cpu_s)),
        Metric("wakeups_per_mb", "/MB", False, lambda s: _per(s.sleeps, s.bytes / MB)),
        Metric("sleeps", "", False, lambda s: s.sleeps),
        Metric("cpu_s", "s", False, lambda s: s.cpu_s),
    )
}


@dataclass(frozen=True)
class Spread:
    """The median of several runs and the range they lie in."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """None if nothing was measured."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(statistics.median(known), min(known), max(known))


@dataclass(frozen=True)
class Calls:
    """System calls of both ends, counted apart from the timed runs."""

    per_message: float
    by_name: dict[str, float]


@dataclass(frozen=True)
class Row:
    """One workload on one set-up."""

    setup: str
    metrics: dict[str, Spread]
    # Against the first set-up of the workload, round by round.
    ratios: dict[str, Spread]
    calls: Calls | None
    ring_share: float | None


@dataclass(frozen=True)
class Outcome:
    """One workload on all its set-ups, or why it cannot run here."""

    workload: str
    title: str
    rows: tuple[Row, ...] = ()
    samples: tuple[Sample, ...] = ()
    discarded: int = 0
    foreign: float = 0.0
    steal: float = 0.0
    cannot_run: str | None = None
    problems: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)

    def row(self, setup: str) -> Row | None:
        """The row of a set-up, if it was measured."""
        return next((row for row in self.rows if row.setup == setup), None)


def ratio(
    samples: Sequence[Sample], metric: Metric, setup: str, base: str
) -> Spread | None:
    """Setup divided by base, within each round."""
    values: dict[tuple[str, int], float | None] = {
        (sample.setup, sample.round): metric.of(sample) for sample in samples
    }
    found = []
    for (name, number), value in values.items():
        against = values.get((base, number))
        if name == setup and value is not None and against:
            found.append(value / against)
    return Spread.of(found)


def summarize(
    samples: Sequence[Sample],
    setups: Sequence[str],
    calls: dict[str, Calls | None],
) -> tuple[Row, ...]:
    """A row for each set-up that has samples."""
    rows = []
    for setup in setups:
        own = [sample for sample in samples if sample.setup == setup]
        if not own:
            continue
        metrics, ratios = {}, {}
        for metric in METRICS.values():
            spread = Spread.of(metric.of(sample) for sample in own)
            if spread is not None:
                metrics[metric.name] = spread
            against = ratio(samples, metric, setup, setups[0])
            if against is not None and setup != setups[0]:
                ratios[metric.name] = against
        shares = [s.ring_share for s in own if s.ring_share is not None]
        rows.append(
            Row(
                setup=setup,
                metrics=metrics,
                ratios=ratios,
                calls=calls.get(setup),
                ring_share=statistics.median(shares) if shares else None,
            )
        )
    return tuple(rows)


def outcome_json(outcome: Outcome) -> JsonObject:
    """As one part of the document that --json prints."""
    return asdict(outcome)


def _spreads(found: Any) -> dict[str, Spread]:
    return {name: Spread(**value) for name, value in found.items()}


def outcome_from_json(found: JsonObject) -> Outcome:
    """The other way round; KeyError or TypeError when it is not such a part."""
    rows = tuple(
        Row(
            setup=row["setup"],
            metrics=_spreads(row["metrics"]),
            ratios=_spreads(row["ratios"]),
            calls=Calls(**row["calls"]) if row["calls"] else None,
            ring_share=row["ring_share"],
        )
        for row in found["rows"]
    )
    return Outcome(
        **{
            **found,
            "rows": rows,
            "samples": tuple(Sample(**sample) for sample in found["samples"]),
            "problems": tuple(found["problems"]),
        }
    )
