# SPDX-License-Identifier: Apache-2.0
"""Runs one of CPython's own suites and writes down how each test of it ended.

    python3.11 inside.py SUITE REPORT SECONDS [@FILE | TEST...]

This runs in the interpreter under test, so it needs nothing but that interpreter and
its ``test`` package.  REPORT gets a line of JSON when a test starts, and one when it
ends: a test that hangs or takes the process with it is the one without an end.  FILE
lists patterns of tests to leave out; TESTs are the only ones to run.  A test that takes
longer than SECONDS ends the process, with the stacks of all threads on standard error.
"""

from __future__ import annotations

import faulthandler
import fnmatch
import importlib
import json
import os
import signal
import sys
import time
import traceback
import unittest
from typing import Any

# What regrtest calls resources.  Tests that want the Internet under "network" skip
# themselves where there is none; most under that name want the loopback device.
RESOURCES = ("network", "cpu", "subprocess", "walltime", "decimal", "largefile")


class Report:
    """The file with the results.

    It is opened for each line, so that no descriptor of ours is open during a test:
    many of them count descriptors, or close all that they find.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._pid = os.getpid()
        # Tests replace what they like of these modules.
        self._open, self._write, self._close = os.open, os.write, os.close
        self._dumps, self._getpid = json.dumps, os.getpid

    def line(self, **fields: object) -> None:
        """Adds one line; not for a child that a test forked and forgot."""
        if self._getpid() != self._pid:
            return
        fd = self._open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._write(fd, self._dumps(fields).encode() + b"\n")
        self._close(fd)


class Result(unittest.TestResult):
    """Tells the report, and sets the watchdog of each test."""

    def __init__(self, report: Report, limit: float) -> None:
        super().__init__()
        self._report = report
        self._limit = limit
        self._outcome = ""
        self._detail = ""
        self._began = 0.0

    def startTest(self, test: Any) -> None:
        super().startTest(test)
        self._report.line(start=test.id())
        self._outcome, self._detail = "", ""
        self._began = time.monotonic()
        print(f"-- {test.id()}", file=sys.__stderr__, flush=True)
        faulthandler.dump_traceback_later(
            self._limit, exit=True, file=sys.__stderr__ or 2
        )

    def stopTest(self, test: Any) -> None:
        faulthandler.cancel_dump_traceback_later()
        super().stopTest(test)
        self._report.line(
            end=test.id(),
            outcome=self._outcome or "ok",
            detail=self._detail,
            seconds=round(time.monotonic() - self._began, 3),
        )
        # A child that outlived its test must not be taken for the next one's.
        self._reap()

    def _reap(self) -> None:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass

    def _bad(self, test: Any, outcome: str, error: Any) -> None:
        text = "".join(traceback.format_exception(*error))
        print(f"-- {outcome}: {test.id()}\n{text}", file=sys.__stderr__, flush=True)
        detail = text.strip().rsplit("\n", 1)[-1][:300]
        if not isinstance(test, unittest.TestCase):
            # setUpClass and the like: no test has started.
            self._report.line(end=test.id(), outcome=outcome, detail=detail, seconds=0)
        elif not self._outcome or self._outcome == "skip":
            self._outcome, self._detail = outcome, detail

    def addFailure(self, test: Any, err: Any) -> None:
        self._bad(test, "fail", err)

    def addError(self, test: Any, err: Any) -> None:
        self._bad(test, "error", err)

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            failed = issubclass(err[0], test.failureException)
            self._bad(test, "fail" if failed else "error", err)

    def addSkip(self, test: Any, reason: str) -> None:
        if not isinstance(test, unittest.TestCase):
            self._report.line(end=test.id(), outcome="skip", detail=reason, seconds=0)
        else:
            self._outcome, self._detail = self._outcome or "skip", reason

    def addExpectedFailure(self, test: Any, err: Any) -> None:
        self._outcome = "expected failure"

    def addUnexpectedSuccess(self, test: Any) -> None:
        self._outcome = "unexpected success"


def _flat(suite: unittest.TestSuite) -> list[unittest.TestCase]:
    found: list[unittest.TestCase] = []
    for item in suite:
        if isinstance(item, unittest.TestSuite):
            found.extend(_flat(item))
        else:
            found.append(item)
    return found


def main(arguments: list[str]) -> int:
    """Runs the suite; 0 whatever its tests say, for the report says it."""
    name, path, limit, *chosen = arguments
    # The directory of a script is not a place to import from.
    del sys.path[0]
    faulthandler.enable()
    # A shell starts what it puts in the background with this signal ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    report = Report(path)

    support: Any = importlib.import_module("test.support")
    support.use_resources = list(RESOURCES)
    # Some modules ask for resources, and skip themselves, as they are imported.
    try:
        suite = unittest.defaultTestLoader.loadTestsFromName(f"test.{name}")
    except unittest.SkipTest as reason:
        report.line(end=f"test.{name}", outcome="skip", detail=str(reason), seconds=0)
        report.line(done=True)
        return 0
    tests = _flat(suite)
    if chosen and chosen[0].startswith("@"):
        with open(chosen[0][1:]) as file:
            patterns = file.read().splitlines()
        for test in list(tests):
            if any(fnmatch.fnmatchcase(test.id(), pattern) for pattern in patterns):
                tests.remove(test)
                report.line(left_out=test.id())
    elif chosen:
        tests = [test for test in tests if test.id() in chosen]
    # The suite drops each test that has run, with all that it holds, if nobody else has
    # it: tests that collect garbage a hundred times take minutes otherwise.
    suite = unittest.TestSuite(tests)
    tests.clear()
    suite.run(Result(report, float(limit)))
    faulthandler.dump_traceback_later(60, exit=True)
    support.reap_children()
    report.line(done=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
