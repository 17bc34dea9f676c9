# SPDX-License-Identifier: Apache-2.0
"""A whole stress run: jobs, levels, time, and what came of it."""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kmap.results import EXIT_FAILED, EXIT_OK, JsonObject
from kmap.stress.fallback import Comparison, compare
from kmap.stress.faults import FAULTS, KINDS
from kmap.stress.judge import MISMATCH_KINDS, Finding
from kmap.stress.match import CaseResult, Runner
from kmap.stress.scenarios import case_id
from kmap.stress.stream import Pattern

SCHEMA = "kmap.stress/1"
LEVELS = ("ring", "socket")
DEFAULT_TRANSPORT = "shm"
# Of the time of a run of both levels, the part of the ring level: sockets have more
# ways to go wrong.
_RING_PART = 0.2
# A run of this many connections in which none was upgraded has tested nothing.
_ENOUGH_CONNECTIONS = 50


@dataclass(frozen=True)
class Options:
    """What is asked for."""

    seed: int
    duration: float
    levels: tuple[str, ...]
    faults: tuple[str, ...]
    jobs: int
    kernel: bool = False
    transport: str = DEFAULT_TRANSPORT
    patience: float = 20.0
    # (job, number): this case again and again, and nothing else.
    case: tuple[int, int] | None = None
    verify_fallback: bool = False
    # Goes on beyond the duration until each kind of fault has been counted so often.
    at_least: int = 0


@dataclass(frozen=True)
class Failure:
    """A finding, and how to see it again."""

    level: str
    case: str
    kind: str
    detail: str
    replay: str


@dataclass
class Tally:
    """Counts of one level, while it runs and afterwards."""

    cases: int = 0
    connections: int = 0
    upgraded: int = 0
    bytes: int = 0
    ring_bytes: int = 0
    faults: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FAULTS, 0))
    leaked_fds: int = 0

    def add(self, result: CaseResult) -> None:
        self.cases += 1
        self.connections += result.connections
        self.upgraded += result.upgraded
        self.bytes += result.bytes
        self.ring_bytes += result.ring_bytes
        self.leaked_fds += result.leaked_fds
        for kind, count in result.faults.items():
            self.faults[kind] += count

    def to_json(self) -> JsonObject:
        return {
            "cases": self.cases,
            "connections": self.connections,
            "upgraded": self.upgraded,
            "bytes": self.bytes,
            "ring_bytes": self.ring_bytes,
            "kernel_bytes": self.bytes - self.ring_bytes,
            "faults": dict(self.faults),
        }


@dataclass(frozen=True)
class StressResult:
    """What a run found."""

    options: Options
    seconds: float
    # By level, in the order in which they ran.
    tallies: dict[str, Tally]
    failures: tuple[Failure, ...]
    fallback: tuple[Comparison, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.failures and all(line.ok for line in self.fallback)

    @property
    def exit_code(self) -> int:
        return EXIT_OK if self.ok else EXIT_FAILED

    def count(self, *kinds: str) -> int:
        """Failures of these kinds."""
        return sum(failure.kind in kinds for failure in self.failures)

    def to_json(self) -> JsonObject:
        # Rings alone would flatter the figures of a run that is about sockets.
        main = self.tallies.get("socket") or self.tallies.get("ring") or Tally()
        document: JsonObject = {
            "schema": SCHEMA,
            "ok": self.ok,
            "seed": self.options.seed,
            "connections": main.connections,
            "upgraded": main.upgraded,
            "bytes": main.bytes,
            "ring_bytes": main.ring_bytes,
            "kernel_bytes": main.bytes - main.ring_bytes,
            "faults": dict(main.faults),
            "mismatches": self.count(*MISMATCH_KINDS),
            "hangs": self.count("hang"),
            "leaked_fds": sum(tally.leaked_fds for tally in self.tallies.values()),
            "errors": self.count("error", "died", "upgraded", "idle"),
            "kernel": self.options.kernel,
            "transport": self.options.transport,
            "seconds": round(self.seconds, 1),
            "levels": {level: t.to_json() for level, t in self.tallies.items()},
            "failures": [
                {
                    "level": failure.level,
                    "case": failure.case,
                    "kind": failure.kind,
                    "detail": failure.detail,
                    "replay": failure.replay,
                }
                for failure in self.failures
            ],
        }
        if self.options.verify_fallback:
            document["fallback"] = [line.to_json() for line in self.fallback]
        return document


def _seconds(value: float) -> str:
    return f"{value:g}"


def replay_line(options: Options, level: str, case: str = "") -> str:
    """The command that runs a case again, or the whole run without a case."""
    words = ["python", "-m", "kmap.stress", "--seed", str(options.seed)]
    words += ["--level", level, "--duration", _seconds(options.duration)]
    words += ["--faults", ",".join(options.faults) or "none"]
    words += ["--case", case] if case else ["--jobs", str(options.jobs)]
    if options.kernel:
        words.append("--kernel")
    if options.transport != DEFAULT_TRANSPORT:
        words += ["--transport", options.transport]
    return shlex.join(words)


# Called with (fraction done, tally of the level, level) now and then.
Watcher = Callable[[float, Tally, str], None]


class Session:
    """One run."""

    def __init__(self, options: Options, watch: Watcher) -> None:
        self._options = options
        self._watch = watch
        self._pattern = Pattern.create(options.seed)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._tallies: dict[str, Tally] = {}
        self._failures: list[Failure] = []
        self._crashes: list[BaseException] = []

    def run(self) -> StressResult:
        """Runs all levels; the first failure ends the run."""
        options = self._options
        start = time.monotonic()
        comparisons: tuple[Comparison, ...] = ()
        try:
            if options.verify_fallback:
                comparisons = self._compare()
            else:
                for level in options.levels:
                    self._run_level(level, start)
        finally:
            self._pattern.close()
        return StressResult(
            options=options,
            seconds=time.monotonic() - start,
            tallies=self._tallies,
            failures=tuple(self._failures),
            fallback=comparisons,
        )

    def _runner(self, level: str, job: int, *, kernel: bool) -> Runner:
        return Runner(
            level,
            self._options.seed,
            job,
            self._pattern,
            kernel=kernel,
            transport=self._options.transport,
            patience=self._options.patience,
        )

    def _run_level(self, level: str, start: float) -> None:
        options = self._options
        if self._stop.is_set():
            return
        tally = self._tallies[level] = Tally()
        until = start + options.duration
        if level == "ring" and len(options.levels) > 1:
            until = start + options.duration * _RING_PART
        jobs = [options.case[0]] if options.case else list(range(options.jobs))
        threads = [
            threading.Thread(target=self._run_job, args=(level, job, tally, until))
            for job in jobs
        ]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                threads[0].join(0.2)
                if not threads[0].is_alive():
                    for thread in threads:
                        thread.join(0.2)
                done = (time.monotonic() - start) / max(options.duration, 0.001)
                self._watch(min(done, 1.0), tally, level)
        finally:
            self._stop_if(any(thread.is_alive() for thread in threads))
            for thread in threads:
                thread.join()
        if self._crashes:
            raise self._crashes[0]
        self._look_idle(level, tally)

    def _stop_if(self, interrupted: bool) -> None:
        if interrupted:
            self._stop.set()

    def _look_idle(self, level: str, tally: Tally) -> None:
        """A run that upgrades nothing must not pass."""
        idle = tally.connections >= _ENOUGH_CONNECTIONS and not tally.upgraded
        if idle and not self._options.kernel and not self._stop.is_set():
            text = f"none of {tally.connections} connections was upgraded"
            self._fail(level, "", [Finding("idle", text)])

    def _run_job(self, level: str, job: int, tally: Tally, until: float) -> None:
        options = self._options
        try:
            runner = self._runner(level, job, kernel=options.kernel)
            try:
                number = options.case[1] if options.case else 0
                while not self._over(level, tally, until):
                    identity = case_id(level, options.seed, job, number, options.faults)
                    result = runner.run(identity)
                    with self._lock:
                        tally.add(result)
                        self._fail(level, f"{job}:{number}", result.findings)
                    number += 0 if options.case else 1
            finally:
                runner.close()
        except BaseException as error:
            self._crashes.append(error)
            self._stop.set()

    def _over(self, level: str, tally: Tally, until: float) -> bool:
        if self._stop.is_set():
            return True
        options = self._options
        kinds = [kind for kind in options.faults if KINDS[kind].ring or level != "ring"]
        with self._lock:
            few = any(tally.faults[kind] < options.at_least for kind in kinds)
        return time.monotonic() >= until and (options.case is not None or not few)

    def _fail(self, level: str, case: str, findings: list[Finding]) -> None:
        for finding in findings:
            self._stop.set()
            replay = replay_line(self._options, level, case)
            self._failures.append(
                Failure(level, case, finding.kind, finding.detail, replay)
            )

    def _compare(self) -> tuple[Comparison, ...]:
        tally = self._tallies["socket"] = Tally()

        def note(fraction: float, result: CaseResult) -> None:
            tally.add(result)
            self._watch(fraction, tally, "socket")

        kernel = self._runner("socket", 0, kernel=True)
        kmap = self._runner("socket", 0, kernel=False)
        try:
            return compare(self._options.seed, self._options.faults, kernel, kmap, note)
        finally:
            kernel.close()
            kmap.close()
