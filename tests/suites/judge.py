# SPDX-License-Identifier: Apache-2.0
"""Compares the runs of a suite, test by test."""

from __future__ import annotations

import fnmatch
import importlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kmap.results import JsonObject
from tests.suites.run import Ended, Mode, Run

# Python 3.10 has tomllib under the name of the package it came from.
tomllib = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

EXCLUSIONS = Path(__file__).with_name("exclusions.toml")
# Outcomes with which a test is content.
GOOD = frozenset({"ok", "skip", "expected failure"})


@dataclass(frozen=True)
class Exclusion:
    """Tests that are not run, by a pattern of their names, and why.

    kernel says what they do without Kmap: "hang", "fail", or "varies" for a test that
    sometimes passes.  The first two are tried again in each run.
    """

    test: str
    kernel: str
    reason: str

    def covers(self, test: str) -> bool:
        return fnmatch.fnmatchcase(test, self.test)


def exclusions(path: Path = EXCLUSIONS) -> list[Exclusion]:
    """The list of tests that are left out."""
    entries = tomllib.loads(path.read_text()).get("exclusion", [])
    found = [Exclusion(**entry) for entry in entries]
    for entry in found:
        if entry.kernel not in ("hang", "fail", "varies"):
            raise ValueError(f"{path}: {entry.test}: kernel is hang, fail or varies")
        if len(entry.reason.split()) < 4:
            raise ValueError(f"{path}: {entry.test}: that is no reason")
    return found


@dataclass(frozen=True)
class Difference:
    """A test that does not end the same way, or not well without Kmap."""

    suite: str
    test: str
    kernel: tuple[str, ...]
    kmap: tuple[str, ...]
    detail: str

    @property
    def by_kernel(self) -> bool:
        """Whether the test fails without Kmap: then it vouches for nothing."""
        return not GOOD.issuperset(self.kernel)

    def to_json(self) -> JsonObject:
        return {
            "suite": self.suite,
            "test": self.test,
            "kernel": list(self.kernel),
            "kmap": list(self.kmap),
            "detail": self.detail,
        }


@dataclass
class Verdict:
    """What the runs of one suite say together."""

    suite: str
    tests: int = 0
    passed: int = 0
    skipped: int = 0
    excluded: int = 0
    differences: list[Difference] = field(default_factory=list)
    connections: int = 0
    ring_bytes: int = 0
    kernel_seconds: float = 0.0
    kmap_seconds: float = 0.0

    def to_json(self) -> JsonObject:
        return {
            "suite": self.suite,
            "tests": self.tests,
            "passed": self.passed,
            "skipped": self.skipped,
            "excluded": self.excluded,
            "differences": [difference.to_json() for difference in self.differences],
            "connections": self.connections,
            "ring_bytes": self.ring_bytes,
            "kernel_seconds": round(self.kernel_seconds, 1),
            "kmap_seconds": round(self.kmap_seconds, 1),
        }


def _outcomes(runs: Iterable[Run], test: str) -> list[Ended]:
    return [run.tests.get(test, Ended("missing")) for run in runs]


def judge(suite: str, runs: Sequence[Run]) -> Verdict:
    """The verdict on all runs of one suite, some in each mode.

    Under Kmap a test may end in each way in which it ended on the kernel, and in no
    other.
    """
    kernel = [run for run in runs if run.mode is Mode.KERNEL]
    kmap = [run for run in runs if run.mode is Mode.KMAP]
    verdict = Verdict(
        suite,
        excluded=len(set().union(*(run.left_out for run in runs))),
        connections=sum(run.connections for run in kmap),
        ring_bytes=sum(run.ring_bytes for run in kmap),
        kernel_seconds=sum(run.seconds for run in kernel),
        kmap_seconds=sum(run.seconds for run in kmap),
    )
    names = {name for run in runs for name in run.tests}
    verdict.tests = len(names)
    for name in sorted(names):
        on_kernel, on_kmap = _outcomes(kernel, name), _outcomes(kmap, name)
        ways = tuple(sorted({end.outcome for end in on_kernel}))
        kmap_ways = tuple(sorted({end.outcome for end in on_kmap}))
        if set(kmap_ways) <= {"ok", "expected failure"}:
            verdict.passed += 1
        elif kmap_ways == ("skip",):
            verdict.skipped += 1
        if GOOD.issuperset(ways) and set(kmap_ways) <= set(ways):
            continue
        detail = next(
            (end.detail for end in on_kmap + on_kernel if end.outcome not in GOOD), ""
        )
        verdict.differences.append(Difference(suite, name, ways, kmap_ways, detail))
    return verdict
