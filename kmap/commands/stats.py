# SPDX-License-Identifier: Apache-2.0
"""``kmap stats [PID]``: the counters of processes that have upgraded connections."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from kmap import native, procfs, snapshot
from kmap.counters import ProcessCounters, counter_meanings, counters
from kmap.render import renders
from kmap.results import (
    EXIT_OK,
    CommandFailed,
    JsonObject,
    SubParsers,
    command_parser,
)


@dataclass(frozen=True)
class StatsResult:
    """Counters of one process or of all."""

    processes: tuple[ProcessCounters, ...]

    @property
    def exit_code(self) -> int:
        return EXIT_OK

    def to_json(self) -> JsonObject:
        return {
            "schema": "kmap.stats/1",
            "ok": True,
            "processes": [asdict(process) for process in self.processes],
        }


def add_parser(subparsers: SubParsers) -> None:
    """Adds the parser of this command."""
    parser = command_parser(
        subparsers,
        "stats",
        run,
        help="show the counters of processes under Kmap",
        description="Shows the counters of one process, or of every process that has "
        "upgraded a\nconnection.  Byte counts include connections that are open.",
    )
    parser.add_argument("pid", nargs="?", type=int, metavar="PID")


def _never_upgraded(process: procfs.Process) -> ProcessCounters:
    return ProcessCounters(
        pid=process.pid,
        comm=process.comm,
        pids=(process.pid,),
        counters={counter.name: 0 for counter in native.counters()},
        reasons={},
        connections={},
    )


def collect(processes: Sequence[procfs.Process]) -> tuple[ProcessCounters, ...]:
    """The counters of every statistics memfd that one of processes holds."""
    found, notes = snapshot.groups(processes)
    if notes and not found:
        raise CommandFailed(notes[0])
    for note in notes:
        print(f"kmap stats: {note}", file=sys.stderr)
    return tuple(counters(group) for group in found)


def run(args: argparse.Namespace) -> StatsResult:
    """Reads the counters now."""
    if args.pid is None:
        return StatsResult(collect(procfs.survey()[0]))
    if not procfs.exists(args.pid):
        raise CommandFailed(f"there is no process {args.pid}")
    process = procfs.process(args.pid)
    if process is None:
        raise CommandFailed(
            f"process {args.pid} may not be looked at: run this as its user or as root"
        )
    if not process.has_library:
        raise CommandFailed(
            f"process {args.pid} ({process.comm}) does not have the library: "
            "start it with kmap run -- CMD"
        )
    found = collect([process])
    return StatsResult(found or (_never_upgraded(process),))


@renders(StatsResult)
def _render(result: StatsResult, console: Console) -> None:
    if not result.processes:
        console.print("No process has upgraded a connection.")
    meanings = counter_meanings()
    reasons = {reason.name: reason.meaning for reason in native.reasons()}
    for process in result.processes:
        pids = ", ".join(map(str, process.pids))
        states = ", ".join(f"{n} {state}" for state, n in process.connections.items())
        table = Table(
            title=f"{process.comm} ({pids}): {states or 'no open connections'}",
            title_justify="left",
            box=None,
        )
        table.add_column("counter")
        table.add_column("value", justify="right")
        table.add_column("meaning", style="dim")
        for name, value in process.counters.items():
            table.add_row(name, str(value), meanings.get(name, ""))
        for name, value in process.reasons.items():
            table.add_row(f"kernel: {name}", str(value), reasons.get(name, ""))
        console.print(table)
