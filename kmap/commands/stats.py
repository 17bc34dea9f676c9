# SPDX-License-Identifier: Apache-2.0
"""``kmap stats [PID]``: the counters of processes that have upgraded connections."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from kmap import native, procfs, wire
from kmap.render import renders
from kmap.results import (
    EXIT_OK,
    CommandFailed,
    JsonObject,
    SubParsers,
    command_parser,
)

_BYTES = ("ring_rx_bytes", "ring_tx_bytes", "kernel_rx_bytes", "kernel_tx_bytes")


@dataclass(frozen=True)
class ProcessCounters:
    """The counters of one statistics memfd, which forked processes share."""

    pid: int
    comm: str
    # All processes that hold the memfd, pid among them.
    pids: tuple[int, ...]
    # By name; byte counts include connections that are still open.
    counters: dict[str, int]
    # How often each reason kept a connection on the kernel; zeros left out.
    reasons: dict[str, int]
    # Connections now, by state.
    connections: dict[str, int]


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


def _counters(
    statistics: wire.Statistics, holders: list[procfs.Process]
) -> ProcessCounters:
    values = {
        counter.name: value
        for counter, value in zip(native.counters(), statistics.counters, strict=False)
    }
    connections: dict[str, int] = {}
    for row in statistics.rows:
        state = row.state.name.lower()
        connections[state] = connections.get(state, 0) + 1
        for name in _BYTES:
            values[name] = values.get(name, 0) + getattr(row, name)
    pids = tuple(holder.pid for holder in holders)
    first = next((p for p in holders if p.pid == statistics.pid), holders[0])
    return ProcessCounters(
        pid=first.pid,
        comm=first.comm,
        pids=pids,
        counters=values,
        reasons={
            reason.name: value
            for reason, value in zip(native.reasons(), statistics.reasons, strict=False)
            if reason.name and value
        },
        connections=connections,
    )


def _never_upgraded(process: procfs.Process) -> ProcessCounters:
    return ProcessCounters(
        pid=process.pid,
        comm=process.comm,
        pids=(process.pid,),
        counters={counter.name: 0 for counter in native.counters()},
        reasons={},
        connections={},
    )


def collect(processes: list[procfs.Process]) -> tuple[ProcessCounters, ...]:
    """The counters of every statistics memfd that one of processes holds."""
    files: dict[tuple[int, int], procfs.StatisticsFile] = {}
    holders: dict[tuple[int, int], list[procfs.Process]] = {}
    for process in processes:
        for file in process.statistics:
            files.setdefault(file.identity, file)
            holders.setdefault(file.identity, []).append(process)
    found = []
    for identity, file in files.items():
        try:
            statistics = procfs.read_statistics(file)
        except wire.NotStatistics as error:
            raise CommandFailed(
                f"{file.path}: {error}: the process runs another version of the library"
            ) from error
        if statistics is not None:
            found.append(_counters(statistics, holders[identity]))
    return tuple(found)


def run(args: argparse.Namespace) -> StatsResult:
    """Reads the counters now."""
    if args.pid is None:
        return StatsResult(collect(procfs.processes()))
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
    meanings = {counter.name: counter.meaning for counter in native.counters()}
    # The table of counters speaks of closed connections only; see _counters.
    meanings |= {
        name: meanings[name].partition(" of closed")[0].partition(" by closed")[0]
        for name in _BYTES
    }
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
