# SPDX-License-Identifier: Apache-2.0
"""What Kmap is to reach, and whether a result reaches it.

A goal compares a figure of the set-up "kmap" with the best of others, within each
round where both are of one workload, or with a number.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kmap.bench.figures import METRICS, Outcome, Sample

_SIZES = ("64", "1k", "16k", "64k", "1m")


@dataclass(frozen=True)
class Goal:
    """kmap's figure is at most (or at least) so many times that of the best base."""

    text: str
    workload: str
    metric: str
    bases: tuple[str, ...]
    limit: float
    # Of another workload, where the bases are compared across two.
    base_workload: str = ""

    @property
    def at_least(self) -> bool:
        """Whether more is better."""
        return METRICS[self.metric].higher_is_better


@dataclass(frozen=True)
class Judged:
    """A goal and what was measured; value is None where it was not."""

    text: str
    value: float | None
    relation: str
    limit: float
    reached: bool | None
    note: str = ""


def _ratio(text: str, workload: str, metric: str, bases: str, limit: float) -> Goal:
    return Goal(text, workload, metric, tuple(bases.split()), limit)


def _all() -> tuple[Goal, ...]:
    r = _ratio
    trip = "64 B round trip"
    epoll, blocking = "pingpong-64-epoll-1cpu", "pingpong-64-blocking-1cpu"
    goals = [
        r(f"{trip}, one CPU, epoll: of TCP", epoll, "p50_us", "tcp", 0.40),
        r(f"{trip}, one CPU, epoll: of Unix", epoll, "p50_us", "unix", 0.65),
        r(f"{trip}, one CPU, epoll: of a sockmap", epoll, "p50_us", "sockmap", 0.75),
        r(f"{trip}, one CPU, epoll: of pipes", epoll, "p50_us", "pipe fifo", 1.0),
        r(f"{trip}, one CPU, blocking: of TCP", blocking, "p50_us", "tcp", 0.40),
        r(f"{trip}, one CPU, blocking: of pipes", blocking, "p50_us", "pipe fifo", 1.0),
    ]
    for mode in ("blocking", "epoll"):
        name = f"pingpong-64-{mode}-2cpu"
        text = f"{trip}, two CPUs, sleeping, {mode}: of TCP"
        goals.append(r(text, name, "p50_us", "tcp", 0.85))
    goals.append(
        Goal(
            f"{trip}, two CPUs, both busy: of TCP sleeping",
            "pingpong-64-busy-2cpu",
            "p50_us",
            ("tcp",),
            1 / 50,
            base_workload="pingpong-64-blocking-2cpu",
        )
    )
    text = f"{trip}, two CPUs, both busy: of a cache line's"
    goals.append(r(text, "pingpong-64-busy-2cpu", "p50_us", "line", 2))
    for size, part in zip(_SIZES, (10, 7, 3.5, 3.5, 2.5), strict=True):
        name = f"stream-{size}-2cpu"
        text = f"CPU s/GB, writes of {size}: of"
        goals.append(r(f"{text} TCP", name, "cpu_s_per_gb", "tcp", 1 / part))
        goals.append(
            r(f"{text} Unix and pipes", name, "cpu_s_per_gb", "unix pipe fifo", 0.4)
        )
    for size in ("16k", "64k"):
        name = f"stream-{size}-2cpu"
        text = f"bytes/s, writes of {size}, two CPUs: of"
        goals.append(r(f"{text} TCP", name, "bytes_per_s", "tcp", 3))
        goals.append(r(f"{text} Unix", name, "bytes_per_s", "unix", 2))
    goals.append(
        r("messages/s, 64 B, two CPUs: of TCP", "stream-64-2cpu", "messages_per_s",
          "tcp", 10)
    )  # fmt: skip
    for size in _SIZES:
        name = f"stream-{size}-2cpu"
        goals.append(
            r(f"wake-ups per MB, writes of {size}", name, "wakeups_per_mb", "", 0.05)
        )
    goals += [
        r("1,000 idle connections: CPU s", "idle-1000", "cpu_s", "", 0.01),
        r("1,000 idle connections: wake-ups", "idle-1000", "sleeps", "", 0),
        r("fan-in: requests per CPU second, of TCP", "fanin-128-1cpu",
          "messages_per_cpu_s", "tcp", 2),
    ]  # fmt: skip
    for cpus in (1, 2):
        text = f"a connection for each request, {cpus} CPU: of TCP's rate"
        goals.append(r(text, f"churn-128-{cpus}cpu", "messages_per_s", "tcp", 0.97))
    for suffix, text in (("hog", "beside a hog"), ("quota", "quota of one CPU")):
        cpus = 1 if suffix == "hog" else 2
        for kind in ("pingpong-64-epoll", "stream-16k", "fanin-128"):
            name = f"{kind}-{cpus}cpu-{suffix}"
            what = f"{kind}, {text}: of TCP's rate"
            goals.append(r(what, name, "messages_per_s", "tcp", 0.97))
    goals += [
        r("redis GET: requests per CPU second", "redis-get", "messages_per_cpu_s",
          "kernel", 1.5),
        r("redis SET: requests per CPU second", "redis-set", "messages_per_cpu_s",
          "kernel", 1.5),
        r("wrk and nginx: requests per CPU second", "wrk-nginx", "messages_per_cpu_s",
          "kernel", 1.6),
        r("pgbench -S: transactions per CPU second", "pgbench", "messages_per_cpu_s",
          "kernel", 1.1),
        r("iperf3: CPU s/GB", "iperf3", "cpu_s_per_gb", "kernel", 1 / 3),
    ]  # fmt: skip
    return tuple(goals)


GOALS = _all()


def _values(outcome: Outcome, setup: str, metric: str) -> dict[int, float]:
    def value(sample: Sample) -> float | None:
        return METRICS[metric].of(sample)

    return {
        sample.round: found
        for sample in outcome.samples
        if sample.setup == setup and (found := value(sample)) is not None
    }


def _value(goal: Goal, outcome: Outcome, other: Outcome) -> float | None:
    own = _values(outcome, "kmap", goal.metric)
    if not own:
        return None
    if goal.bases == ():
        return statistics.median(own.values())
    bases = [_values(other, base, goal.metric) for base in goal.bases]
    bases = [base for base in bases if base]
    if not bases:
        return None
    best = max if goal.at_least else min
    if goal.base_workload:
        base = best(statistics.median(found.values()) for found in bases)
        return statistics.median(own.values()) / base if base else None
    ratios = []
    for number, value in own.items():
        known = [base[number] for base in bases if base.get(number)]
        if known:
            ratios.append(value / best(known))
    return statistics.median(ratios) if ratios else None


def _busy_calls(outcomes: Mapping[str, Outcome]) -> Judged:
    outcome = outcomes.get("pingpong-64-busy-2cpu")
    row = outcome.row("kmap") if outcome else None
    value = row.calls.per_message if row and row.calls else None
    return Judged(
        "system calls per message, busy pair",
        value,
        "at most",
        0,
        # What the ends need to meet is spread over the messages.
        None if value is None else value < 0.005,
    )


def _tails(outcomes: Mapping[str, Outcome]) -> Judged:
    """p99 against the kernel's, in every workload that has one."""
    worst, worse, seen = None, [], 0
    for outcome in outcomes.values():
        row = outcome.row("kmap")
        found = row.ratios.get("p99_us") if row else None
        if found is None:
            continue
        seen += 1
        if found.median > 1:
            worse.append(f"{outcome.workload} {found.median:.2f}")
        if worst is None or found.median > worst:
            worst = found.median
    return Judged(
        f"p99 of TCP's, the worst of {seen} workloads",
        worst,
        "at most",
        1,
        None if worst is None else worst <= 1,
        ", ".join(worse),
    )


def judge(outcomes: Sequence[Outcome]) -> list[Judged]:
    """Every goal about something that was measured."""
    by_name = {outcome.workload: outcome for outcome in outcomes}
    judged = []
    for goal in GOALS:
        outcome = by_name.get(goal.workload)
        other = by_name.get(goal.base_workload or goal.workload)
        value = _value(goal, outcome, other) if outcome and other else None
        reached = None
        if value is not None:
            reached = value >= goal.limit if goal.at_least else value <= goal.limit
        relation = "at least" if goal.at_least else "at most"
        judged.append(Judged(goal.text, value, relation, goal.limit, reached))
    judged += [_busy_calls(by_name), _tails(by_name)]
    return [each for each in judged if each.value is not None]
