# SPDX-License-Identifier: Apache-2.0
"""CPython's own suites on the kernel and under Kmap, compared test by test.

scripts/suites sets up what this needs.  Each run is a session of its own, with
KMAP_UPGRADE_AFTER=0 under Kmap, so that connections move to rings as they are made.
Exit codes: 0 no difference, 1 some, 2 usage, 77 cannot run here.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from rich.console import Console
from rich.table import Table

from kmap.render import byte_count
from kmap.results import EXIT_CANNOT_RUN, EXIT_FAILED, EXIT_OK, CannotRun, JsonObject
from tests.suites import judge, run
from tests.suites.judge import Exclusion, Verdict
from tests.suites.run import SUITES, Mode, Run

DOCS = Path(__file__).resolve().parents[2] / "docs" / "suites.md"
TABLE = re.compile(r"(?<=<!-- table -->\n).*(?=<!-- end of table -->)", re.DOTALL)
# An excluded test that hangs is given up after this.
EXCLUDED_LIMIT_S = 20.0


@dataclass(frozen=True)
class Result:
    """What all runs say."""

    python: str
    kernel: str
    repeat: int
    verdicts: list[Verdict]
    # Excluded tests that passed on the kernel, and patterns that named no test.
    passing_exclusions: list[str]
    stale_exclusions: list[str]

    @property
    def exit_code(self) -> int:
        bad = any(verdict.differences for verdict in self.verdicts)
        return EXIT_FAILED if bad or self.stale_exclusions else EXIT_OK

    def to_json(self) -> JsonObject:
        return {
            "schema": "kmap.suites/1",
            "ok": self.exit_code == EXIT_OK,
            "python": self.python,
            "kernel": self.kernel,
            "repeat": self.repeat,
            "suites": [verdict.to_json() for verdict in self.verdicts],
            "passing_exclusions": self.passing_exclusions,
            "stale_exclusions": self.stale_exclusions,
        }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _one(
    python: str,
    suite: str,
    mode: Mode,
    place: Path,
    left_out: Sequence[str],
    settings: Mapping[str, str],
) -> Run:
    done = run.run_suite(
        python, suite, mode, place, left_out=left_out, settings=settings
    )
    bad = sum(end.outcome not in judge.GOOD for end in done.tests.values())
    _say(
        f"{mode.value:6} {suite}: {len(done.tests)} tests, {bad} not good, "
        f"{done.connections} connections, {done.seconds:.0f} s"
    )
    return done


def _passing(python: str, suite: str, names: Sequence[str], place: Path) -> list[str]:
    """Which of the excluded tests pass without Kmap, each in a process of its own."""
    passing = []
    for number, name in enumerate(names):
        directory = place / str(number)
        directory.mkdir(parents=True)
        found = run.run_suite(
            python,
            suite,
            Mode.KERNEL,
            directory,
            only=[name],
            test_limit=EXCLUDED_LIMIT_S,
        )
        if all(end.outcome == "ok" for end in found.tests.values()):
            passing.append(name)
    return passing


def compare(
    suites: Sequence[str],
    *,
    repeat: int = 1,
    jobs: int = 1,
    keep: Path | None = None,
    settings: Mapping[str, str] = MappingProxyType({}),
) -> Result:
    """Runs the suites in both modes and judges them."""
    python = run.find_python()
    excluded = judge.exclusions()
    base = keep or Path(tempfile.mkdtemp(prefix="suites-"))
    runs: dict[str, list[Run]] = {suite: [] for suite in suites}
    try:
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            futures = []
            for turn in range(repeat):
                for suite in suites:
                    for mode in Mode:
                        place = base / f"{suite}-{mode.value}-{turn}"
                        place.mkdir(parents=True)
                        patterns = [entry.test for entry in excluded]
                        futures.append(
                            pool.submit(
                                _one, python, suite, mode, place, patterns, settings
                            )
                        )
            for future in futures:
                done = future.result()
                runs[done.suite].append(done)
        passing: list[str] = []
        for suite, its_runs in runs.items():
            again = _again(excluded, its_runs)
            passing += _passing(python, suite, again, base / f"{suite}-excluded")
    finally:
        if keep is None:
            shutil.rmtree(base, ignore_errors=True)
    return Result(
        python=run.version(python),
        kernel=platform.release(),
        repeat=repeat,
        verdicts=[judge.judge(suite, runs[suite]) for suite in suites],
        passing_exclusions=passing,
        stale_exclusions=stale_exclusions(excluded, runs),
    )


def _again(excluded: Sequence[Exclusion], runs: Sequence[Run]) -> list[str]:
    left_out = set().union(*(done.left_out for done in runs))
    firm = [entry for entry in excluded if entry.kernel != "varies"]
    return sorted(n for n in left_out if any(entry.covers(n) for entry in firm))


def stale_exclusions(
    excluded: Sequence[Exclusion], runs: dict[str, list[Run]]
) -> list[str]:
    """Exclusions of the suites that ran which leave out nothing."""
    stale = []
    for entry in excluded:
        its_runs = runs.get(entry.test.split(".")[1], [])
        left_out = set().union(*(done.left_out for done in its_runs))
        if its_runs and not any(entry.covers(name) for name in left_out):
            stale.append(entry.test)
    return stale


_COLUMNS = (
    "suite",
    "tests",
    "passed",
    "skipped",
    "differences",
    "connections by ring",
    "bytes by ring",
)
# For a terminal of 80 columns.
_SHORT_COLUMNS = ("suite", "tests", "passed", "skipped", "differ", "rings", "bytes")


def _rows(result: Result) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        (
            verdict.suite,
            str(verdict.tests),
            str(verdict.passed),
            str(verdict.skipped),
            str(len(verdict.differences)),
            str(verdict.connections // result.repeat),
            byte_count(verdict.ring_bytes // result.repeat),
        )
        for verdict in result.verdicts
    ]
    every = result.verdicts
    rows.append(
        (
            "all",
            str(sum(v.tests for v in every)),
            str(sum(v.passed for v in every)),
            str(sum(v.skipped for v in every)),
            str(sum(len(v.differences) for v in every)),
            str(sum(v.connections for v in every) // result.repeat),
            byte_count(sum(v.ring_bytes for v in every) // result.repeat),
        )
    )
    return rows


def _show(result: Result, console: Console) -> None:
    table = Table(
        title=f"CPython {result.python} on Linux {result.kernel}, "
        f"{result.repeat} run{'s' if result.repeat > 1 else ''} in each mode"
    )
    for number, column in enumerate(_SHORT_COLUMNS):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    rows = _rows(result)
    for row in rows[:-1]:
        table.add_row(*row)
    table.add_section()
    table.add_row(*rows[-1])
    console.print(table)
    for verdict in result.verdicts:
        for difference in verdict.differences:
            where = "fails on the kernel" if difference.by_kernel else "differs"
            console.print(
                f"{where}: {difference.test}\n"
                f"  kernel: {', '.join(difference.kernel)}; "
                f"Kmap: {', '.join(difference.kmap)}\n"
                f"  {difference.detail.splitlines()[0] if difference.detail else ''}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
    for name in result.passing_exclusions:
        console.print(f"excluded, but passes on the kernel here: {name}", markup=False)
    for name in result.stale_exclusions:
        console.print(f"excluded, but there is no such test: {name}", markup=False)


def markdown(result: Result) -> str:
    """The table of docs/suites.md."""
    lines = [
        f"CPython {result.python}, Linux {result.kernel}, {result.repeat} "
        f"run{'s' if result.repeat > 1 else ''} in each mode; connections and bytes "
        "are those of one run.",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|---|" + "---:|" * (len(_COLUMNS) - 1),
    ]
    lines += ["| " + " | ".join(row) + " |" for row in _rows(result)]
    return "\n".join(lines) + "\n"


def _write_docs(result: Result) -> None:
    text = DOCS.read_text()
    if not TABLE.search(text):
        raise CannotRun(f"{DOCS} has no place for the table")
    DOCS.write_text(TABLE.sub(lambda _: markdown(result), text))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return value


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.startswith("KMAP_"):
        raise argparse.ArgumentTypeError("it has the form KMAP_NAME=VALUE")
    return name, value


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is asked for; the value is the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/suites",
        description="Runs CPython's own suites on the kernel and under Kmap, and "
        "compares every test.",
        allow_abbrev=False,
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="default: all")
    parser.add_argument("--repeat", type=_positive, default=1, metavar="N")
    parser.add_argument(
        "--jobs", type=_positive, default=1, metavar="N", help="runs at a time"
    )
    parser.add_argument("--json", action="store_true", help="one document on stdout")
    parser.add_argument(
        "--docs", action="store_true", help="write the table into docs/suites.md"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep what the runs said, in DIR"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=_setting,
        metavar="NAME=VALUE",
        help="a setting of the library, such as KMAP_RING_SIZE=4096",
    )
    parser.add_argument("--list", action="store_true", help="names of all suites")
    args = parser.parse_args(argv)
    if args.list:
        print(*SUITES, sep="\n")
        return EXIT_OK
    unknown = [name for name in args.suites if name not in SUITES]
    if unknown:
        parser.error(f"no suite {unknown[0]}; --list names them")
    suites = [name for name in SUITES if not args.suites or name in args.suites]
    if args.docs and (suites != list(SUITES) or args.set):
        parser.error("--docs is for all suites, with no other settings")
    try:
        result = compare(
            suites,
            repeat=args.repeat,
            jobs=args.jobs,
            keep=args.keep,
            settings=dict(args.set),
        )
        if args.docs:
            _write_docs(result)
    except CannotRun as error:
        _say(f"scripts/suites: {error}")
        return EXIT_CANNOT_RUN
    if args.json:
        print(json.dumps(result.to_json(), indent=2))
    else:
        _show(result, Console())
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
