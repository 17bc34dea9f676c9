# SPDX-License-Identifier: Apache-2.0
"""``kmap top``: what processes and connections do now, on a full screen."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from kmap.columns import Column, lay_out
from kmap.load import Load, Meter, ProcessLoad
from kmap.render import byte_count, count, printable, renders
from kmap.results import (
    EXIT_OK,
    CannotRun,
    CommandFailed,
    JsonObject,
    SubParsers,
    command_parser,
    interval_option,
)

_EPILOG = """\
Keys: q ends it, Enter shows the connections of a process and Escape goes back;
c, r, k, w and n sort by CPU, ring bytes, kernel bytes, wake-ups and name, i the other
way round; Space stops and goes on.
Bytes per second of a process are those of both ways; the first line adds up the column,
so what goes between two processes under Kmap is there twice.
Wake-ups are doorbells and futexes by which a process woke the other end.  Processes
that share their counters since a fork are one line, with a + behind the first's number.
"""


@dataclass(frozen=True)
class TopResult:
    """The last frame."""

    seconds: float
    processes: tuple[ProcessLoad, ...]
    hidden_processes: int
    notes: tuple[str, ...]
    # Otherwise it has been on the screen.
    printed: bool = True

    @property
    def exit_code(self) -> int:
        return EXIT_OK

    def to_json(self) -> JsonObject:
        return {
            "schema": "kmap.top/1",
            "ok": True,
            "seconds": self.seconds,
            "hidden_processes": self.hidden_processes,
            "notes": list(self.notes),
            "processes": [
                {**asdict(each), "rates": each.rates._asdict()}
                for each in self.processes
            ],
        }


def add_parser(subparsers: SubParsers) -> None:
    """Adds the parser of this command."""
    parser = command_parser(
        subparsers,
        "top",
        run,
        help="show live what processes and connections carry, and why not",
        description="Shows the processes under Kmap on a full screen: CPU, bytes per "
        "second by ring and by\nkernel, wake-ups, connections by state, and the most "
        "frequent reason.",
        epilog=_EPILOG,
    )
    interval_option(parser)
    parser.add_argument(
        "--once",
        action="store_true",
        help="print one frame as text, of two looks; so does --json",
    )
    parser.add_argument(
        "--svg", type=Path, metavar="FILE", help="write one frame as a picture"
    )


def run(args: argparse.Namespace) -> TopResult:
    """Until it is ended, or one frame."""
    if args.svg is not None:
        from kmap import top_screen

        picture, load = top_screen.picture(args.interval)
        try:
            args.svg.write_text(picture)
        except OSError as error:
            raise CommandFailed(f"{args.svg} cannot be written: {error}") from error
        return _result(load, printed=False)
    if args.once or args.json:
        meter = Meter()
        meter.sample()
        time.sleep(args.interval)
        return _result(meter.sample())
    # The screen is drawn on standard error, where textual has it.
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise CannotRun(
            "standard input and standard error are no terminal: --once prints one frame"
        )
    from kmap import top_screen

    load, code = top_screen.show(args.interval)
    if code:
        raise SystemExit(code)
    return _result(load, printed=False)


def _result(load: Load, *, printed: bool = True) -> TopResult:
    busiest = sorted(load.processes, key=lambda p: -(p.rates.ring + p.rates.kernel))
    return TopResult(
        load.seconds, tuple(busiest), load.hidden, load.notes, printed=printed
    )


COLUMNS = (
    Column("process"),
    Column("cpu %", True),
    Column("ring/s", True),
    Column("kernel/s", True),
    Column("wakes/s", True),
    Column("ring", True),
    Column("kernel", True),
    Column("pend", True),
    Column("why"),
)


def cells(each: ProcessLoad) -> tuple[str, ...]:
    """The texts of COLUMNS."""
    more = "+" if len(each.pids) > 1 else ""
    return (
        f"{printable(each.comm)}/{each.pid}{more}",
        "" if each.cpu_percent is None else f"{each.cpu_percent:.0f}",
        byte_count(int(each.rates.ring)),
        byte_count(int(each.rates.kernel)),
        count(each.wakeups),
        str(each.ring),
        str(each.kernel),
        str(each.pending),
        each.reason,
    )


@renders(TopResult)
def _render(result: TopResult, console: Console) -> None:
    for note in result.notes:
        print(f"kmap top: {note}", file=sys.stderr)
    if not result.printed:
        return
    if result.hidden_processes:
        print(
            f"kmap top: {result.hidden_processes} processes may not be looked at",
            file=sys.stderr,
        )
    for line in lay_out(COLUMNS, [cells(each) for each in result.processes]):
        console.file.write(line + "\n")
