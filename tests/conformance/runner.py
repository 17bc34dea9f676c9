# SPDX-License-Identifier: Apache-2.0
"""Runs one conformance case in a fresh process, with or without Kmap.

    python tests/conformance/runner.py [--mode MODE] [--repeat N] CASE...

CASE is module.function, or module.function[value]; ``--list`` names them all, and
``all`` runs them all.  MODE is kernel, or the transport under Kmap: kmap (which is
shm), pipe or fifo.  Exit codes: 0 passed, 1 failed, 77 cannot run here.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import os
import pkgutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
# The directory of a script is not a place to import from.
sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).parent)]

from kmap.results import CannotRun  # noqa: E402
from tests import modes  # noqa: E402
from tests.conformance import kit  # noqa: E402

PACKAGE = "tests.conformance.cases"
WATCHDOG = 30.0
HUNG, SKIPPED = 124, 77


@dataclass(frozen=True)
class Case:
    """One case by its full name, and what to call."""

    name: str
    function: kit.CaseFunction
    args: tuple[object, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        self.function(*self.args)


def cases_of(module_name: str) -> dict[str, Case]:
    module = importlib.import_module(f"{PACKAGE}.{module_name}")
    found: dict[str, Case] = {}
    for name, function in vars(module).items():
        if (
            name.startswith("_")
            or getattr(function, "__module__", "") != module.__name__
        ):
            continue
        if not callable(function) or isinstance(function, type):
            continue
        options = getattr(function, "case_settings", {})
        values = getattr(function, "case_values", None)
        if values is None:
            full = f"{module_name}.{name}"
            found[full] = Case(full, function, (), options)
            continue
        for value in values:
            label = getattr(value, "__name__", str(value)).lstrip("_")
            full = f"{module_name}.{name}[{label}]"
            assert full not in found, f"two cases are called {full}"
            found[full] = Case(full, function, (value,), options)
    return found


def all_cases() -> dict[str, Case]:
    package = importlib.import_module(PACKAGE)
    found: dict[str, Case] = {}
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda i: i.name):
        found.update(cases_of(info.name))
    return found


def case_named(name: str) -> Case:
    return cases_of(name.partition(".")[0])[name]


@dataclass(frozen=True)
class Outcome:
    """How a case ended: its exit code, and what it said."""

    code: int
    output: str

    @property
    def passed(self) -> bool:
        return self.code == 0

    @property
    def skipped(self) -> bool:
        return self.code == SKIPPED

    @property
    def hung(self) -> bool:
        return self.code == HUNG


def run_case(case: Case, mode: str) -> Outcome:
    """Runs the case in its own session, so that nothing of it can stay behind."""
    process = subprocess.Popen(
        [sys.executable, *kit.runner_arguments("--inside", case.name)],
        env=modes.environment(mode, **{"KMAP_UPGRADE_AFTER": "1", **case.settings}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    hung = False
    try:
        output, _ = process.communicate(timeout=WATCHDOG)
    except subprocess.TimeoutExpired:
        hung = True
        process.send_signal(signal.SIGABRT)  # faulthandler shows every thread
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        _end_session(process)
        output, _ = process.communicate()
    _end_session(process)
    code = HUNG if hung else process.returncode
    text = output.decode(errors="replace")
    if hung:
        text += f"\nended by the watchdog after {WATCHDOG:.0f} s"
    elif code < 0:
        text += f"\nended by signal {-code}"
    return Outcome(code, text)


def _end_session(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _inside(name: str) -> int:
    faulthandler.enable()
    try:
        case_named(name).run()
    except kit.Skip as reason:
        print(reason)
        return SKIPPED
    return 0


def _far(descriptor: int) -> int:
    kit.Far(socket.socket(fileno=descriptor)).serve()
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--mode", choices=list(modes.MODES), default="kernel")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="names of all cases")
    parser.add_argument("--inside", metavar="CASE", help=argparse.SUPPRESS)
    parser.add_argument("--far", type=int, metavar="FD", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.inside:
        return _inside(options.inside)
    if options.far is not None:
        return _far(options.far)
    known = all_cases()
    if options.list:
        print(*known, sep="\n")
        return 0
    wanted = list(known) if options.cases == ["all"] else options.cases
    if not wanted or (unknown := [name for name in wanted if name not in known]):
        parser.error(
            f"no case {unknown[0]}; --list names them" if wanted else "name a case"
        )
    try:
        return _run_all([known[name] for name in wanted * options.repeat], options.mode)
    except CannotRun as reason:
        print(reason, file=sys.stderr)
        return SKIPPED


def _run_all(cases: list[Case], mode: str) -> int:
    worst = 0
    for case in cases:
        outcome = run_case(case, mode)
        word = "ok" if outcome.passed else "skipped" if outcome.skipped else "FAILED"
        print(f"{word:8}{case.name}", flush=True)
        if not outcome.passed:
            print(outcome.output, flush=True)
        if not outcome.passed and not outcome.skipped:
            worst = 1
        elif outcome.skipped and not worst:
            worst = SKIPPED
    return worst


if __name__ == "__main__":
    sys.exit(main())
