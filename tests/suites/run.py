# SPDX-License-Identifier: Apache-2.0
"""Runs one of CPython's suites in one mode, and reads how every test of it ended."""

from __future__ import annotations

import contextlib
import enum
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import IO

from kmap import launch, native, procfs
from kmap.demo.ringbytes import Collector
from kmap.results import CannotRun

INSIDE = Path(__file__).with_name("inside.py")

# CPython's suites that use sockets, or what the library has its hands on.
SUITES = (
    "test_socket",
    "test_socketserver",
    "test_selectors",
    "test_select",
    "test_epoll",
    "test_poll",
    "test_asyncio",
    "test_ssl",
    "test_httplib",
    "test_httpservers",
    "test_urllib2_localnet",
    "test_ftplib",
    "test_smtplib",
    "test_poplib",
    "test_imaplib",
    "test_telnetlib",
    "test_xmlrpc",
    "test_multiprocessing_fork",
    "test_multiprocessing_spawn",
    "test_multiprocessing_forkserver",
    "test_subprocess",
    "test_os",
    "test_signal",
    "test_threading",
    "test_asyncore",
    "test_wsgiref",
    "test_docxmlrpc",
    "test_logging",
)

# Under Kmap: rings from the first byte on.
SETTINGS = {"KMAP_UPGRADE_AFTER": "0"}
# One test may take this long, and one suite; both are many times what they take.
TEST_LIMIT_S = 180.0
SUITE_LIMIT_S = 3600.0
# How often a suite is started again after a test that took the process with it.
MOST_STARTS = 30
# How often to look for new processes.  The statistics of one that ends sooner after its
# first upgrade are missed.
_LOOK_S = 0.02
_RUN_ENV = "SUITES_RUN"


class Mode(enum.Enum):
    """With the library or without."""

    KERNEL = "kernel"
    KMAP = "kmap"


@dataclass(frozen=True)
class Ended:
    """How one test ended."""

    outcome: str
    detail: str = ""
    seconds: float = 0.0


@dataclass
class Run:
    """One run of one suite."""

    suite: str
    mode: Mode
    tests: dict[str, Ended] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)
    # Connections with both ends on rings, and the bytes put into the rings.
    connections: int = 0
    ring_bytes: int = 0
    seconds: float = 0.0


def find_python() -> str:
    """An interpreter that brings the suites: Debian's, or the one that runs this."""
    own = os.path.realpath(sys.executable)
    for python in ("/usr/bin/python3.11", own):
        if os.access(python, os.X_OK) and _has_suites(python):
            return python
    raise CannotRun(
        "no Python 3.11 with its test package: apt-get install libpython3.11-testsuite"
    )


def _has_suites(python: str) -> bool:
    code = "import sys, test.test_socket;sys.exit(sys.version_info[:2] != (3, 11))"
    done = subprocess.run(
        [python, "-I", "-c", code], stderr=subprocess.DEVNULL, check=False
    )
    return done.returncode == 0


def version(python: str) -> str:
    """The version of the interpreter."""
    done = subprocess.run(
        [python, "-I", "-c", "import platform; print(platform.python_version())"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout.strip()


def environment(
    mode: Mode, directory: Path, settings: Mapping[str, str]
) -> dict[str, str]:
    """The environment of a run."""
    env = launch.without_kmap(os.environ)
    for name in list(env):
        if name.startswith(("PYTHON", "VIRTUAL_ENV", "PYTEST", "COV")):
            del env[name]
    env.update(TMPDIR=str(directory), LC_ALL="C.UTF-8")
    if mode is Mode.KMAP:
        env = launch.environment(env, options={**SETTINGS, **settings})
    return env


def run_suite(
    python: str,
    suite: str,
    mode: Mode,
    directory: Path,
    *,
    left_out: Sequence[str] = (),
    only: Sequence[str] = (),
    test_limit: float = TEST_LIMIT_S,
    settings: Mapping[str, str] = MappingProxyType({}),
) -> Run:
    """Runs the suite in directory, which must be empty and stays behind.

    settings are added to SETTINGS.
    """
    run = Run(suite, mode)
    began = time.monotonic()
    env = environment(mode, directory, settings)
    patterns = directory / "left-out"
    done = False
    with Collector() as collector:
        for start in range(MOST_STARTS):
            names = list(only)
            if not only:
                patterns.write_text("\n".join([*left_out, *run.tests]))
                names = [f"@{patterns}"]
            cwd = directory / f"cwd-{start}"
            cwd.mkdir()
            report = directory / f"report-{start}"
            report.touch()
            argv = [python, str(INSIDE), suite, str(report), str(test_limit), *names]
            with open(directory / f"output-{start}", "w+b") as output:
                status = _watch(argv, env, cwd, output, collector)
                done = _read(report, run, _how_it_ended(status, output))
            # Chosen tests are not gone on with: who asks for one knows what it does.
            if done or only:
                break
        _count_rings(run, collector)
    run.left_out.difference_update(run.tests)
    if not done and not only:
        run.tests[f"({suite})"] = Ended("died", f"after {MOST_STARTS} starts")
    run.seconds = time.monotonic() - began
    return run


def _watch(
    argv: Sequence[str],
    env: Mapping[str, str],
    cwd: Path,
    output: IO[bytes],
    collector: Collector,
) -> int:
    """Runs argv in a session of its own, of which nothing stays behind."""
    token = secrets.token_hex(8)
    process = subprocess.Popen(
        argv,
        env={**env, _RUN_ENV: token},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )
    deadline = time.monotonic() + SUITE_LIMIT_S
    try:
        while time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LOOK_S)
                break
            if "LD_PRELOAD" in env:
                collector.look(procfs.descendants(process.pid))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _end_marked(f"{_RUN_ENV}={token}".encode())
    return process.returncode


def _end_marked(mark: bytes) -> None:
    """Ends what left the session: such processes still have the environment."""
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):
            environ = Path(f"/proc/{entry}/environ").read_bytes()
            if mark in environ.split(b"\0"):
                os.kill(int(entry), signal.SIGKILL)


def _how_it_ended(status: int, output: IO[bytes]) -> Ended:
    """What to say of the test in which the process ended."""
    output.seek(0)
    text = output.read().decode(errors="replace")
    # faulthandler, whose exit code is that of any error.
    if re.search(r"^Timeout \(\d+:\d+:\d+.*\)!$", text, re.MULTILINE):
        return Ended("hang", text[text.rindex("Timeout (") :][:4000])
    said = text.strip().rsplit("\n", 1)[-1][:300]
    if status < 0:
        return Ended("died", f"{signal.Signals(-status).name}: {said}")
    return Ended("died", f"exit code {status}: {said}")


def _read(report: Path, run: Run, end: Ended) -> bool:
    """Adds what the report says to run; whether the suite came to its end."""
    started, done = "", False
    before = len(run.tests)
    for line in report.read_text().splitlines():
        entry = json.loads(line)
        if "start" in entry:
            started = entry["start"]
        elif "end" in entry:
            run.tests[entry["end"]] = Ended(
                entry["outcome"], entry["detail"], entry["seconds"]
            )
            started = "" if entry["end"] == started else started
        elif "left_out" in entry:
            run.left_out.add(entry["left_out"])
        done = "done" in entry
    if done:
        return True
    if started:
        run.tests[started] = end
    elif len(run.tests) == before:
        # It does not get as far as a test: nothing comes of trying again.
        run.tests[f"({run.suite})"] = end
        return True
    return False


def _count_rings(run: Run, collector: Collector) -> None:
    """Adds up what the statistics of all processes of the run say."""
    names = [counter.name for counter in native.counters()]
    upgrades, closed = names.index("upgrades"), names.index("ring_tx_bytes")
    ends = 0
    for statistics in collector.statistics():
        ends += statistics.counters[upgrades]
        run.ring_bytes += statistics.counters[closed]
        # What was open at the end of a process never got to the counters.
        run.ring_bytes += sum(row.ring_tx_bytes for row in statistics.rows)
    run.connections = ends // 2
