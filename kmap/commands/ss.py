# SPDX-License-Identifier: Apache-2.0
"""``kmap ss``: live connections of all processes, and which way their bytes go."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.text import Text

from kmap import filters
from kmap.columns import Column, color_system, lay_out
from kmap.load import Meter, Rates
from kmap.progress import orderly_end
from kmap.render import byte_count, printable, renders
from kmap.results import (
    EXIT_OK,
    JsonObject,
    SubParsers,
    UsageError,
    command_parser,
    interval_option,
)
from kmap.snapshot import Connection, Snapshot, look

_EPILOG = """\
FILTER is in the words of ss(8), a part of them:
  state ring,pending     sport = :8080     comm = envoy      not reason = policy
  port = 80 or pid = 12  dport >= :1024    dst 10.0.0.0/8    ( ... ) and ...
Quote parentheses, < and > for the shell.  Options and FILTER must all match.
"""


@dataclass(frozen=True)
class SsResult:
    """All connections found, by process, and what could not be looked at."""

    connections: tuple[Connection, ...]
    # Programs that may not be looked at, mostly those of other users.
    hidden_processes: int
    # Processes whose statistics are of another version, a line each.
    notes: tuple[str, ...]
    wide: bool = False

    @property
    def exit_code(self) -> int:
        return EXIT_OK

    def to_json(self) -> JsonObject:
        return {
            "schema": "kmap.ss/1",
            "ok": True,
            "hidden_processes": self.hidden_processes,
            "notes": list(self.notes),
            "connections": [each._asdict() for each in self.connections],
        }


def add_parser(subparsers: SubParsers) -> None:
    """Adds the parser of this command."""
    parser = command_parser(
        subparsers,
        "ss",
        run,
        help="list live connections and which way their bytes go",
        description="Lists connections that are on a ring, of every process that can "
        "be looked at\n(run as root to see those of other users).  Each connection has "
        "two ends and so\ntwo lines if both are on this host.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "-a",
        "--all",
        action="store_true",
        help="also TCP connections that processes under Kmap have on the kernel, with "
        "the reason",
    )
    parser.add_argument(
        "-w",
        "--watch",
        action="store_true",
        help="show it again and again, with bytes per second, the busiest first",
    )
    interval_option(parser)
    parser.add_argument(
        "-W", "--wide", action="store_true", help="all columns: also fd, role, sizes"
    )
    parser.add_argument(
        "--state",
        metavar="S[,S]",
        help="only in these states: ring, kernel, pending; kernel implies --all",
    )
    parser.add_argument(
        "--pid", type=int, action="append", metavar="PID", help="only of this process"
    )
    parser.add_argument(
        "--comm", action="append", metavar="NAME", help="only of programs of this name"
    )
    for name, end in (
        ("--port", "either end"),
        ("--sport", "this end"),
        ("--dport", "the other end"),
    ):
        parser.add_argument(
            name,
            type=int,
            action="append",
            metavar="PORT",
            help=f"only with this port at {end}",
        )
    parser.add_argument("filter", nargs="*", metavar="FILTER", help="see below")


def _filter(args: argparse.Namespace) -> filters.Filter:
    wanted = [filters.parse(args.filter)]
    if args.state is not None:
        wanted.append(filters.parse(["state", args.state]))
    if args.pid:
        wanted.append(lambda row: row.pid in args.pid)
    if args.comm:
        wanted.append(lambda row: row.comm in args.comm)
    port_of = filters.port_of
    if args.port:
        wanted.append(
            lambda row: (
                port_of(row.local) in args.port or port_of(row.peer) in args.port
            )
        )
    if args.sport:
        wanted.append(lambda row: port_of(row.local) in args.sport)
    if args.dport:
        wanted.append(lambda row: port_of(row.peer) in args.dport)
    return filters.every(wanted)


def _include_kernel(args: argparse.Namespace) -> bool:
    # Whoever asks for a state or a reason by name wants to see it.
    words = [*args.filter, args.state or ""]
    return bool(args.all) or any("kernel" in w or "reason" in w for w in words)


def _result(seen: Snapshot, wanted: filters.Filter, *, wide: bool) -> SsResult:
    return SsResult(
        tuple(each for each in seen.connections if wanted(each)),
        seen.hidden,
        seen.notes,
        wide,
    )


def run(args: argparse.Namespace) -> SsResult:
    """Looks once, or again and again until it is interrupted."""
    wanted = _filter(args)
    include_kernel = _include_kernel(args)
    if not args.watch:
        seen = look(include_kernel=include_kernel)
        return _result(seen, wanted, wide=args.wide)
    if args.json:
        raise UsageError("--json prints one document and --watch has no end")
    with orderly_end():
        return _watch(args, wanted, include_kernel=include_kernel)


def _watch(
    args: argparse.Namespace, wanted: filters.Filter, *, include_kernel: bool
) -> SsResult:
    console = Console()
    result = SsResult((), 0, ())
    meter = Meter()
    # Without a terminal there is nothing to draw over: one table after the other.
    with Live(
        console=console, screen=console.is_terminal, auto_refresh=False, transient=True
    ) as live:
        try:
            while True:
                load = meter.sample()
                busy = [
                    each
                    for each in load.connections
                    if (include_kernel or each.connection.state != "kernel")
                    and wanted(each.connection)
                ]
                busy.sort(key=lambda each: -(each.rates.ring + each.rates.kernel))
                result = SsResult(
                    tuple(each.connection for each in busy),
                    load.hidden,
                    load.notes,
                    args.wide,
                )
                lines = _watch_lines(result, [each.rates for each in busy], console)
                if console.is_terminal:
                    live.update(Text("\n").join(lines), refresh=True)
                else:
                    for line in lines:
                        console.out(line.plain, highlight=False)
                    console.file.flush()
                time.sleep(args.interval)
        except KeyboardInterrupt:
            pass
    return result


_COUNTS = ("ring_rx_bytes", "ring_tx_bytes", "kernel_rx_bytes", "kernel_tx_bytes")
_STYLES = {"ring": "green", "pending": "yellow", "kernel": "red"}
_NARROW = tuple(
    Column(*column)
    for column in (
        ("state",),
        ("process",),
        ("local",),
        ("peer",),
        ("ring rx", True),
        ("ring tx", True),
        ("kernel rx", True),
        ("kernel tx", True),
        ("why",),
    )
)
_MORE = tuple(
    Column(*column)
    for column in (
        ("fd", True),
        ("role",),
        ("transport",),
        ("rx-q", True),
        ("tx-q", True),
        ("ring size", True),
    )
)


def _cells(
    each: Connection, numbers: Sequence[float | None], *, wide: bool
) -> tuple[str, ...]:
    peer = each.peer
    if each.original_dst is not None:
        peer += f" (to {each.original_dst})"
    narrow = (
        each.state,
        f"{printable(each.comm)}/{each.pid}",
        each.local,
        peer,
        *(byte_count(None if n is None else int(n)) for n in numbers),
        each.reason,
    )
    if not wide:
        return narrow
    return (
        *narrow,
        str(each.fd),
        each.role,
        each.transport or "",
        byte_count(each.rx_queued),
        byte_count(each.tx_queued),
        byte_count(each.ring_size),
    )


def _lines(result: SsResult) -> list[str]:
    return lay_out(
        _NARROW + (_MORE if result.wide else ()),
        [
            _cells(each, [getattr(each, name) for name in _COUNTS], wide=result.wide)
            for each in result.connections
        ],
    )


def _watch_lines(
    result: SsResult, rates: Sequence[Rates], console: Console
) -> list[Text]:
    """What fits the terminal; all of it where there is none."""
    room = max(1, console.height - 3) if console.is_terminal else len(rates)
    shown = result.connections[:room]
    columns = tuple(
        Column(f"{name}/s" if right else name, right) for name, right in _NARROW
    )
    text = lay_out(
        columns + (_MORE if result.wide else ()),
        [
            _cells(each, numbers, wide=result.wide)
            for each, numbers in zip(shown, rates, strict=False)
        ],
    )
    lines = [
        Text(line, style, no_wrap=True, overflow="ellipsis")
        for line, style in zip(
            text, ["bold", *(_STYLES[each.state] for each in shown)], strict=True
        )
    ]
    states = [each.state for each in result.connections]
    summary = ", ".join(
        f"{states.count(name)} {name}" for name in _STYLES if name in states
    )
    lines.append(Text(f"{summary or 'no connections'}{_remark(result)}", "dim"))
    return lines


def _remark(result: SsResult) -> str:
    count = result.hidden_processes
    if not count:
        return ""
    noun = "process" if count == 1 else "processes"
    if os.geteuid() == 0:
        return f"; {count} {noun} may not be looked at, even by this root"
    return f"; {count} {noun} may not be looked at by this user: try as root"


def _warn(result: SsResult) -> None:
    for note in result.notes:
        print(f"kmap ss: {note}", file=sys.stderr)
    if remark := _remark(result):
        print(f"kmap ss{remark.replace(';', ':', 1)}", file=sys.stderr)


@renders(SsResult)
def _render(result: SsResult, console: Console) -> None:
    _warn(result)
    if not result.connections:
        console.print(
            "No such connection is on a ring; kmap ss -a also shows those on the "
            "kernel."
        )
        return
    colors = color_system(console)
    styles = {name: console.get_style(style) for name, style in _STYLES.items()}
    heading, *lines = _lines(result)
    console.file.write(heading + "\n")
    for each, line in zip(result.connections, lines, strict=True):
        style = styles[each.state]
        console.file.write(style.render(line, color_system=colors) + "\n")
