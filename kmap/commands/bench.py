# SPDX-License-Identifier: Apache-2.0
"""``kmap bench``: transports and programs, side by side; :mod:`kmap.bench` does it."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kmap import native
from kmap.bench import compare, plot
from kmap.bench.apps import APPS
from kmap.bench.compare import Comparison
from kmap.bench.figures import Outcome
from kmap.bench.session import BenchResult, Plan, Session
from kmap.bench.tables import (
    HEADINGS,
    calls,
    cell,
    columns,
    markdown,
    notes,
    number,
    ratio_metric,
)
from kmap.bench.workloads import SETUPS, SOCKMAP, WORKLOADS, other_setups
from kmap.demo import cpu
from kmap.demo.children import none_left
from kmap.progress import orderly_end, progress_bar
from kmap.render import renders
from kmap.results import Result, SubParsers, UsageError, command_parser

_PAIRS, _SECONDS = 5, 0.5
_QUICK_PAIRS, _QUICK_SECONDS = 2, 0.1
# Columns of a terminal that has room for ranges.
_WIDE = 125


def add_parser(subparsers: SubParsers) -> None:
    """Adds the parser of this command."""
    parser = command_parser(
        subparsers,
        "bench",
        run,
        help="measure Kmap beside TCP, Unix sockets and pipes",
        description="Measures an ordinary TCP program on the kernel and under Kmap, "
        "beside Unix sockets,\npipes, named pipes and the bare ring, and then programs "
        "nobody here wrote.  The\nset-ups take turns; figures are medians with the "
        "range of all rounds.",
        epilog="WORKLOAD is a name, the beginning of names up to a dash, or a pattern; "
        "--list\nshows them.  Exit codes: 1 when a workload failed or, with --compare, "
        "a figure got\nworse; 77 when no workload can run here.",
    )
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD")
    parser.add_argument("--list", action="store_true", help="show the workloads")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{_QUICK_PAIRS} rounds of {_QUICK_SECONDS:g} s",
    )
    parser.add_argument(
        "--pairs",
        type=int,
        metavar="N",
        help=f"rounds in which every set-up has a turn (default {_PAIRS})",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help=f"of one run, some are longer (default {_SECONDS:g})",
    )
    parser.add_argument(
        "--setups",
        metavar="NAMES",
        help=f"comma-separated, of {','.join(SETUPS)},kernel (default: all); with "
        "--transports also kmap-NAME of a transport.  sockmap is only measured where "
        "it is named: TCP that an eBPF program shortens; it takes root, clang, "
        "libbpf-dev and bpftool",
    )
    parser.add_argument(
        "--transports",
        action="store_true",
        help="measure the programs under Kmap with each of its transports, not only "
        "with the default one",
    )
    parser.add_argument(
        "--cpus",
        metavar="LIST",
        help="the CPUs to use, such as 0-1 (default: the last two allowed); runs on "
        "one CPU use the first of these",
    )
    parser.add_argument(
        "--spinner",
        action="store_true",
        help="keep idle CPUs from halting: a program of the scheduler's idle class "
        "runs on each, for all set-ups alike",
    )
    parser.add_argument(
        "--no-calls", action="store_true", help="do not count system calls with strace"
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="leave out the runs that compare bytes"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw it: .svg, .png or .pdf"
    )
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the tables there"
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="measure nothing; say what differs between two files from --json",
    )


def _chosen(words: Sequence[str]) -> list[str]:
    names = [*WORKLOADS, *APPS]
    chosen: list[str] = []
    for word in words:
        found = [
            name
            for name in names
            if name == word
            or name.startswith(f"{word}-")
            or fnmatch.fnmatch(name, word)
        ]
        if word == "apps":
            found = list(APPS)
        if not found:
            raise UsageError(f"there is no workload {word}; --list shows them")
        chosen += found
    return list(dict.fromkeys(chosen or names))


def _setups(text: str | None, others: Sequence[str]) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = tuple(name for name in text.split(",") if name)
    known = (*SETUPS, SOCKMAP, *others)
    unknown = [name for name in names if name not in known and name != "kernel"]
    if unknown or not names:
        raise UsageError(
            f"--setups {text}: there are {', '.join(known)}, and kernel for programs"
        )
    return names


def _cpus(text: str | None) -> tuple[int, ...]:
    if text is None:
        # Interrupts tend to be served on the first.
        return tuple(sorted(os.sched_getaffinity(0), reverse=True)[:2])
    chosen = cpu.parse_cpus(text)
    if chosen is None:
        raise UsageError("--cpus all: name one CPU or two")
    return tuple(sorted(chosen, reverse=True)[:2])


@dataclasses.dataclass(frozen=True)
class Listing:
    """The workloads there are."""

    titles: dict[str, str]
    exit_code: int = 0

    def to_json(self) -> dict[str, object]:
        """One document."""
        return {"schema": "kmap.bench.list/1", "ok": True, "workloads": self.titles}


def _plan(args: argparse.Namespace) -> Plan:
    chosen = _chosen(args.workloads)
    pairs = args.pairs or (_QUICK_PAIRS if args.quick else _PAIRS)
    seconds = args.seconds or (_QUICK_SECONDS if args.quick else _SECONDS)
    if pairs < 1 or seconds <= 0:
        raise UsageError("--pairs is at least 1 and --seconds more than 0")
    others = other_setups() if args.transports else ()
    setups = _setups(args.setups, others)
    return Plan(
        workloads=tuple(WORKLOADS[name] for name in chosen if name in WORKLOADS),
        apps=tuple(APPS[name] for name in chosen if name in APPS),
        pairs=pairs,
        seconds=seconds,
        setups=setups,
        others=others,
        cpus=_cpus(args.cpus),
        spinner=args.spinner,
        calls=not args.no_calls,
        verify=not args.no_verify,
    )


def run(args: argparse.Namespace) -> Result:
    """Measures everything, or compares two results."""
    if args.compare is not None:
        return compare.compare(*args.compare)
    if args.list:
        titles = {w.name: w.title for w in WORKLOADS.values()}
        return Listing({**titles, **{app.name: app.title for app in APPS.values()}})
    plan = _plan(args)
    if args.plot is not None:
        plot.check(args.plot)
    if args.markdown is not None and not args.markdown.absolute().parent.is_dir():
        directory = args.markdown.absolute().parent
        raise UsageError(f"--markdown {args.markdown}: {directory} does not exist")
    # Found out before anything is started.
    native.preload_path()
    native.bench_path()
    with orderly_end(), none_left(), progress_bar(plan.steps) as progress:
        result = Session(plan, progress).run()
    if args.plot is not None:
        plot.draw(result.outcomes, args.plot)
    if args.markdown is not None:
        args.markdown.write_text(markdown(result.outcomes, result.goals))
    files = tuple(str(file) for file in (args.plot, args.markdown) if file is not None)
    return dataclasses.replace(result, files=files)


def _outcome_table(outcome: Outcome, *, ranged: bool) -> Table:
    names = columns(outcome)
    table = Table(
        title=f"{outcome.workload}: {outcome.title}",
        title_justify="left",
        caption="; ".join(notes(outcome)) or None,
        caption_justify="left",
        box=None,
    )
    table.add_column("set-up")
    for name in names:
        table.add_column(HEADINGS[name], justify="right")
    table.add_column("calls/message", justify="right")
    base = outcome.rows[0].setup
    compared = ratio_metric(outcome)
    table.add_column(f"{HEADINGS[compared]} / {base}", justify="right")
    for row in outcome.rows:
        table.add_row(
            row.setup,
            *(cell(row.metrics.get(name), ranged=ranged) for name in names),
            calls(row),
            cell(row.ratios.get(compared)),
        )
    return table


@renders(BenchResult)
def _render(result: BenchResult, console: Console) -> None:
    facts = ", ".join(f"{name} {value}" for name, value in result.facts.items())
    console.print(facts, markup=False)
    bounds = ", ".join(f"{k} {number(v)}" for k, v in result.bounds.items())
    console.print(
        f"{result.pairs} rounds of {result.seconds:g} s, CPUs "
        f"{','.join(map(str, result.cpus))}, load average {result.load_average:.1f}, "
        f"idle CPUs {'kept awake' if result.spinner else 'may halt'}; {bounds}",
        markup=False,
    )
    # On a narrow terminal only the ratio has its range; --json and --markdown have all.
    wide = console.width >= _WIDE
    for outcome in result.outcomes:
        console.print()
        if outcome.cannot_run:
            text = f"{outcome.workload}: cannot run here: {outcome.cannot_run}"
            console.print(text, markup=False)
        elif outcome.rows:
            console.print(_outcome_table(outcome, ranged=wide))
    if result.calls_note:
        console.print(f"System calls: {result.calls_note}", markup=False)
    if result.goals:
        table = Table(title="goals", title_justify="left", box=None)
        for heading in ("goal", "measured", "limit", "", "worse"):
            table.add_column(heading)
        for goal in result.goals:
            table.add_row(
                goal.text,
                number(goal.value or 0),
                f"{goal.relation} {number(goal.limit)}",
                "reached" if goal.reached else "missed",
                goal.note,
            )
        console.print()
        console.print(table)
    for problem in result.problems:
        console.print(f"FAILED {problem}", markup=False, soft_wrap=True)
    for file in result.files:
        console.print(f"wrote {file}", markup=False)


@renders(Comparison)
def _render_comparison(result: Comparison, console: Console) -> None:
    table = Table(
        title=f"{result.files[0]} and {result.files[1]}",
        title_justify="left",
        box=None,
    )
    for heading in ("workload", "set-up", "figure"):
        table.add_column(heading)
    for heading in ("before", "after", "ratio"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for change in result.changes:
        table.add_row(
            change.workload,
            change.setup,
            change.metric,
            cell(change.before),
            cell(change.after),
            "" if change.ratio is None else f"{change.ratio:.2f}",
            change.verdict,
        )
    if result.changes:
        console.print(table)
    console.print(f"{result.same} figures are the same within their ranges")
    for each in result.only:
        console.print(f"only in one: {each}", markup=False)


@renders(Listing)
def _render_listing(result: Listing, console: Console) -> None:
    table = Table(box=None, show_header=False)
    for name, title in result.titles.items():
        table.add_row(name, title)
    console.print(table)
