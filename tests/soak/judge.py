# SPDX-License-Identifier: Apache-2.0
"""Whether what a process holds stays flat, and whether it gives everything back."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kmap.results import JsonObject
from tests.soak.samples import METRICS, Held, Sample

# The second half is cut into so many windows, of each of which the least counts: what
# is there between two rounds of load.
WINDOWS = 8
# No verdict on fewer samples than this in the second half.
ENOUGH = WINDOWS


@dataclass(frozen=True)
class Tolerance:
    """How much more there may be: a part of what there is, and at least so much."""

    part: float
    least: float

    def of(self, level: float) -> float:
        return max(self.part * level, self.least)


# Growth over the second half.
GROWTH = {
    "pss_kb": Tolerance(0.03, 2048),
    "shmem_kb": Tolerance(0.03, 1024),
    "fds": Tolerance(0.02, 2),
    "threads": Tolerance(0.0, 0.5),
    "mappings": Tolerance(0.02, 4),
}
# Of these a connection on a ring has one, for as long as it is there: growth is that of
# the others.  On a busy machine a whole window may pass without a sample between two
# rounds, and has the connections of a round in its least.
PER_CONNECTION = frozenset({"fds", "mappings"})
# Once the load has stopped, beyond what there was after the first round of it.
RETURN = {
    "pss_kb": Tolerance(0.10, 8192),
    "shmem_kb": Tolerance(0.10, 4096),
    "fds": Tolerance(0.0, 4),
    "threads": Tolerance(0.0, 0),
    "mappings": Tolerance(0.05, 16),
}


@dataclass(frozen=True)
class Verdict:
    """One metric of one group."""

    group: str
    metric: str
    # After the first round without load, in the middle of the second half, and
    # without load at the end.
    base: float
    level: float
    final: float
    growth: float
    growth_allowed: float
    return_allowed: float
    judged: bool

    @property
    def flat(self) -> bool:
        return not self.judged or self.growth <= self.growth_allowed

    @property
    def returned(self) -> bool:
        return self.final - self.base <= self.return_allowed

    @property
    def ok(self) -> bool:
        return self.flat and self.returned

    def to_json(self) -> JsonObject:
        return {
            "group": self.group,
            "metric": self.metric,
            "ok": self.ok,
            "flat": self.flat,
            "returned": self.returned,
            "base": self.base,
            "level": self.level,
            "final": self.final,
            "growth": round(self.growth, 2),
            "growth_allowed": round(self.growth_allowed, 2),
            "return_allowed": round(self.return_allowed, 2),
        }


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """The median of the slopes between all pairs (Theil-Sen)."""
    pairs = itertools.combinations(zip(times, values, strict=True), 2)
    slopes = [(v2 - v1) / (t2 - t1) for (t1, v1), (t2, v2) in pairs if t2 > t1]
    return statistics.median(slopes) if slopes else 0.0


def growth(times: Sequence[float], values: Sequence[float]) -> float:
    """How much the least has grown from the first to the last.

    A load that comes and goes does not move it, whatever a round costs while it lasts;
    a leak of the same size in each round does.
    """
    if len(times) < ENOUGH:
        return 0.0
    start, end = times[0], times[-1]
    least: dict[int, float] = {}
    for at, value in zip(times, values, strict=True):
        window = min(WINDOWS - 1, int((at - start) / (end - start) * WINDOWS))
        least[window] = min(value, least.get(window, value))
    return slope(list(least), list(least.values())) * WINDOWS


def _judge_one(
    group: str, metric: str, base: Held, series: Sequence[Sample], final: Held
) -> Verdict:
    values = [float(getattr(sample.groups[group], metric)) for sample in series]
    rows = [sample.groups[group].rows for sample in series]
    others = values
    if metric in PER_CONNECTION:
        others = [value - row for value, row in zip(values, rows, strict=True)]
    times = [sample.at for sample in series]
    level = statistics.median(values) if values else float(getattr(base, metric))
    before = float(getattr(base, metric))
    return Verdict(
        group=group,
        metric=metric,
        base=before,
        level=level,
        final=float(getattr(final, metric)),
        growth=growth(times, others),
        growth_allowed=GROWTH[metric].of(level),
        return_allowed=RETURN[metric].of(before),
        judged=len(values) >= ENOUGH,
    )


def judge(
    base: Mapping[str, Held], series: Sequence[Sample], final: Mapping[str, Held]
) -> list[Verdict]:
    """Verdicts on every metric of every group, from the second half of the series."""
    half = list(series[len(series) // 2 :])
    return [
        _judge_one(group, metric, base[group], half, final[group])
        for group in base
        for metric in METRICS
    ]
