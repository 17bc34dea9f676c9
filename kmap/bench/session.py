# SPDX-License-Identifier: Apache-2.0
"""Takes turns: every set-up of a workload once in each round."""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kmap import __version__
from kmap.bench import apps, calls, driver, figures, goals, machine, sockmap
from kmap.bench.apps import App
from kmap.bench.driver import Place
from kmap.bench.figures import Calls, Outcome, Sample
from kmap.bench.goals import Judged
from kmap.bench.workloads import SOCKMAP, Workload
from kmap.results import (
    EXIT_CANNOT_RUN,
    EXIT_FAILED,
    EXIT_OK,
    CannotRun,
    CommandFailed,
    JsonObject,
)

SCHEMA = "kmap.bench/1"
_STEAL_LIMIT = 0.20
# Less than this of a workload's bytes by ring is no measurement of Kmap.
_RING_LEAST = 0.9
_NO_RINGS = ("churn",)
# Of an app, against the time of a workload of kmap-bench.
_APP_LONGER = 4

Progress = Callable[[str | None], None]


@dataclass(frozen=True)
class Plan:
    """What is measured and how often."""

    workloads: tuple[Workload, ...]
    apps: tuple[App, ...]
    pairs: int = 5
    seconds: float = 0.5
    setups: tuple[str, ...] | None = None
    # Further set-ups of whatever is measured under Kmap: its other transports.
    others: tuple[str, ...] = ()
    # The CPUs of runs on one and on two; the last of two is that of the server.
    cpus: tuple[int, ...] = ()
    spinner: bool = False
    calls: bool = True
    verify: bool = True
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    @property
    def steps(self) -> int:
        """How often progress is reported as done."""
        return self.pairs * (len(self.workloads) + len(self.apps))


@dataclass(frozen=True)
class BenchResult:
    """Everything that was measured."""

    facts: dict[str, str]
    bounds: dict[str, float]
    outcomes: tuple[Outcome, ...]
    goals: tuple[Judged, ...]
    pairs: int
    seconds: float
    cpus: tuple[int, ...]
    spinner: bool
    load_average: float
    calls_note: str | None
    files: tuple[str, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """What went wrong, with the workload it went wrong in."""
        return tuple(
            f"{outcome.workload}: {problem}"
            for outcome in self.outcomes
            for problem in outcome.problems
        )

    @property
    def exit_code(self) -> int:
        """1 when a workload failed, 77 when none could run here."""
        if self.problems:
            return EXIT_FAILED
        if all(outcome.cannot_run for outcome in self.outcomes):
            return EXIT_CANNOT_RUN
        return EXIT_OK

    def to_json(self) -> JsonObject:
        """One document, which --compare reads again."""
        return {
            "schema": SCHEMA,
            "ok": self.exit_code == EXIT_OK,
            "version": __version__,
            "machine": self.facts,
            "bounds": self.bounds,
            "pairs": self.pairs,
            "seconds": self.seconds,
            "cpus": list(self.cpus),
            "spinner": self.spinner,
            "load_average": self.load_average,
            "calls_note": self.calls_note,
            "workloads": [figures.outcome_json(each) for each in self.outcomes],
            "goals": [asdict(each) for each in self.goals],
            "problems": list(self.problems),
            "files": list(self.files),
        }


def _turns(setups: Sequence[str], number: int) -> list[str]:
    """In another order each round, so that nobody always follows the same one."""
    shift = number % len(setups)
    return [*setups[shift:], *setups[:shift]]


def _rounds(
    name: str,
    setups: Sequence[str],
    plan: Plan,
    progress: Progress,
    once: Callable[[str, int], Sample],
) -> tuple[list[Sample], int]:
    """Rounds in which the hypervisor took little; and how many it spoiled."""
    kept: list[Sample] = []
    discarded = number = 0
    while number < plan.pairs:
        samples = []
        for setup in _turns(setups, number + discarded):
            progress(f"{name}, round {number + 1}/{plan.pairs}: {setup}")
            samples.append(once(setup, number))
        if max(s.steal for s in samples) > _STEAL_LIMIT and discarded < plan.pairs:
            discarded += 1
            continue
        kept += samples
        number += 1
        progress(None)
    return kept, discarded


def _outcome(
    name: str,
    title: str,
    samples: list[Sample],
    discarded: int,
    setups: Sequence[str],
    counted: dict[str, Calls | None],
    *,
    rings: bool,
) -> Outcome:
    rows = figures.summarize(samples, setups, counted)
    problems = [
        f"only {row.ring_share:.0%} of the bytes went by ring"
        for row in rows
        if rings and row.ring_share is not None and row.ring_share < _RING_LEAST
    ]
    steal = [sample.steal for sample in samples]
    if max(steal) > _STEAL_LIMIT:
        problems.append(f"the hypervisor took {max(steal):.0%} again and again")
    return Outcome(
        workload=name,
        title=title,
        rows=rows,
        samples=tuple(samples),
        discarded=discarded,
        foreign=statistics.median(sample.foreign for sample in samples),
        steal=statistics.median(steal),
        problems=tuple(problems),
    )


class Session:
    """One run of everything in a plan."""

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self.plan = plan
        self.progress = progress
        self.environments = driver.environments(plan.environment)
        self.calls_note = calls.unavailable() if plan.calls else "not asked for"

    def place(
        self, cpus: int, group: Path | None = None, joined: Path | None = None
    ) -> Place:
        """Where both ends run."""
        ends = (self.plan.cpus[0], self.plan.cpus[0 if cpus == 1 else 1])
        return Place(
            cpus=ends, environments=self.environments, group=group, joined=joined
        )

    def _setups(self, offered: Sequence[str]) -> list[str]:
        wanted = self.plan.setups
        if "kmap" in offered:
            offered = (*offered, *self.plan.others)
        if "pipe" in offered and wanted is not None:
            offered = (*offered, SOCKMAP)
        return [name for name in offered if wanted is None or name in wanted]

    def _need(self, cpus: int) -> None:
        if len(self.plan.cpus) < cpus:
            raise CannotRun(
                f"it needs {cpus} CPUs, and this run may use {len(self.plan.cpus)}"
            )

    @contextlib.contextmanager
    def _group(self, workload: Workload) -> Iterator[Path | None]:
        if not workload.quota:
            yield None
            return
        with machine.quota_of_one_cpu() as group:
            yield group

    def workload(self, workload: Workload) -> Outcome:
        """One workload of kmap-bench."""
        self._need(workload.cpus)
        setups = self._setups(workload.setups)
        counted: dict[str, Calls | None] = {}
        with contextlib.ExitStack() as stack:
            group = stack.enter_context(self._group(workload))
            joined = stack.enter_context(sockmap.group()) if SOCKMAP in setups else None
            place = self.place(workload.cpus, group, joined)
            if self.plan.verify:
                for setup in setups:
                    driver.verify(workload, setup, place)

            def once(setup: str, number: int) -> Sample:
                return driver.measure(
                    workload, setup, place, seconds=self.plan.seconds, number=number
                )

            samples, discarded = _rounds(
                workload.name, setups, self.plan, self.progress, once
            )
            if self.calls_note is None and not workload.hog and not workload.quota:
                for setup in setups:
                    counted[setup] = calls.per_message(workload, setup, place)
        return _outcome(
            workload.name,
            workload.title,
            samples,
            discarded,
            setups,
            counted,
            rings=workload.kind not in _NO_RINGS,
        )

    def app(self, app: App) -> Outcome:
        """One program that nobody here wrote, and its load generator."""
        apps.check(app)
        setups = self._setups(app.setups)
        # One CPU for all of it: CPU per request is steadiest there.
        cpus = self.place(1).cpus
        with contextlib.ExitStack() as stack:
            servers = {
                setup: stack.enter_context(
                    apps.running(app, self.environments[setup], cpus)
                )
                for setup in setups
            }
            seconds = self.plan.seconds * _APP_LONGER
            for at, child in servers.values():
                # Warm-up.
                apps.measure(app, at, child, setup="", seconds=0.2, number=0)

            def once(setup: str, number: int) -> Sample:
                at, child = servers[setup]
                return apps.measure(
                    app, at, child, setup=setup, seconds=seconds, number=number
                )

            samples, discarded = _rounds(
                app.name, setups, self.plan, self.progress, once
            )
        return _outcome(app.name, app.title, samples, discarded, setups, {}, rings=True)

    def _safely(self, name: str, title: str, run: Callable[[], Outcome]) -> Outcome:
        """One that cannot run here, or fails, leaves the others alone."""
        try:
            return run()
        except CannotRun as error:
            return Outcome(workload=name, title=title, cannot_run=str(error))
        except CommandFailed as error:
            return Outcome(workload=name, title=title, problems=(str(error),))

    def run(self) -> BenchResult:
        """Everything, in order."""
        outcomes = []
        load_average = os.getloadavg()[0]
        with contextlib.ExitStack() as stack:
            if self.plan.spinner:
                stack.enter_context(driver.companions("spin", self.plan.cpus))
            bounds = driver.copying(self.place(min(2, len(self.plan.cpus))))
            for workload in self.plan.workloads:
                outcomes.append(
                    self._safely(
                        workload.name,
                        workload.title,
                        lambda workload=workload: self.workload(workload),  # type: ignore[misc]
                    )
                )
            for app in self.plan.apps:
                outcomes.append(
                    self._safely(
                        app.name,
                        app.title,
                        lambda app=app: self.app(app),  # type: ignore[misc]
                    )
                )
        return BenchResult(
            facts=machine.facts(),
            bounds=bounds,
            outcomes=tuple(outcomes),
            goals=tuple(goals.judge(outcomes)),
            pairs=self.plan.pairs,
            seconds=self.plan.seconds,
            cpus=self.plan.cpus,
            spinner=self.plan.spinner,
            load_average=load_average,
            calls_note=self.calls_note,
        )
