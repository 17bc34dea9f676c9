# SPDX-License-Identifier: Apache-2.0
"""``kmap tap``: a packet capture of what goes by ring."""

from __future__ import annotations

import argparse
import os
import pwd
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType
from typing import BinaryIO

from rich.console import Console

from kmap import __version__, procfs
from kmap.render import byte_count, printable, renders
from kmap.results import (
    EXIT_OK,
    CannotRun,
    CommandFailed,
    JsonObject,
    SubParsers,
    UsageError,
    command_parser,
)
from kmap.tap.flow import Sink
from kmap.tap.pcapng import Writer
from kmap.tap.session import Filter, Session

_STDOUT = "-"
_INTERVAL_US = 100
_SNAPLEN_LEAST = 60
# A capture has what the programs say to each other.
_MODE = 0o600


@dataclass(frozen=True)
class TapResult:
    """What was captured, and what was not."""

    file: str
    seconds: float
    connections: int
    packets: int
    # Payload seen; the file has less of it with --snaplen.
    bytes: int
    gaps: int
    lost_bytes: int

    @property
    def exit_code(self) -> int:
        return EXIT_OK

    def to_json(self) -> JsonObject:
        return {"schema": "kmap.tap/1", "ok": True, **asdict(self)}


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise ValueError
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 < value < 65536:
        raise ValueError
    return value


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


# argparse names them in its messages.
_positive.__name__ = "positive number"
_port.__name__ = "port"
_natural.__name__ = "number"
_seconds.__name__ = "number of seconds"


def add_parser(subparsers: SubParsers) -> None:
    """Adds the parser of this command."""
    parser = command_parser(
        subparsers,
        "tap",
        run,
        help="capture what goes by ring, for Wireshark and tshark",
        description="Writes a pcapng file of what connections carry by ring, which "
        "tcpdump does not\nsee, with TCP/IP headers made up around it.  It reads the "
        "memory of the programs\nand changes nothing in them: bytes that are "
        "overwritten before it has copied them\nare lost to it, and counted.  Run it "
        "as the user of the programs or as root; ends\nwith SIGINT (Ctrl-C).",
        epilog="examples:\n"
        "  kmap tap -w capture.pcapng --port 8080\n"
        "  kmap tap -w - --comm envoy | tshark -r - -Y http\n"
        "  kmap tap -w - | wireshark -k -i -",
    )
    parser.add_argument(
        "-w",
        "--write",
        metavar="FILE",
        required=True,
        help="the capture file, replaced if it exists; - for standard output",
    )
    parser.add_argument(
        "--pid", type=_positive, help="only connections of this process"
    )
    parser.add_argument(
        "--port", type=_port, help="only connections with this port at either end"
    )
    parser.add_argument(
        "--comm", metavar="NAME", help="only connections of processes of this name"
    )
    parser.add_argument(
        "--seconds", type=_seconds, metavar="S", help="end after this time"
    )
    parser.add_argument(
        "--count", type=_positive, metavar="N", help="end after N packets or a few more"
    )
    parser.add_argument(
        "--snaplen",
        type=_positive,
        metavar="N",
        default=0,
        help=f"keep only the first N bytes of each packet, headers included; "
        f"{_SNAPLEN_LEAST} or more",
    )
    parser.add_argument(
        "--interval",
        type=_natural,
        metavar="US",
        default=_INTERVAL_US,
        help="microseconds between two looks while nothing happens (default: "
        f"{_INTERVAL_US}); 0 looks all the time, which needs a CPU of its own",
    )


def _tell(text: str) -> None:
    # Names of programs are in it, which may be called anything.
    print(f"kmap tap: {printable(text)}", file=sys.stderr, flush=True)


def _check_pid(pid: int) -> None:
    """Fails early when the only process that is asked for cannot be read."""
    if not procfs.exists(pid):
        raise CommandFailed(f"there is no process {pid}")
    try:
        with open(f"/proc/{pid}/mem", "rb"), open(f"/proc/{pid}/maps", "rb"):
            pass
    except PermissionError as error:
        owner = os.stat(f"/proc/{pid}").st_uid
        try:
            name = pwd.getpwuid(owner).pw_name
        except KeyError:
            name = f"user id {owner}"
        raise CannotRun(
            f"process {pid} is {name}'s and the kernel does not let you read its "
            f"memory: run this as {name} or as root (where kernel.yama.ptrace_scope is "
            "not 0, as root)"
        ) from error
    except OSError as error:
        raise CommandFailed(f"process {pid} has ended") from error
    if not procfs.has_library(pid):
        raise CommandFailed(
            f"process {pid} does not run under Kmap: start it with kmap run"
        )


@contextmanager
def _output(name: str) -> Iterator[BinaryIO]:
    if name == _STDOUT:
        if sys.stdout.isatty():
            raise UsageError(
                "-w - writes binary data, and standard output is a terminal: name a "
                "file, or pipe it into tshark -r -"
            )
        with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as file:
            yield file
        return
    try:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _MODE)
    except OSError as error:
        raise CommandFailed(f"cannot write {name}: {error.strerror}") from error
    with os.fdopen(fd, "wb") as file:
        yield file


@contextmanager
def _until_signal() -> Iterator[list[int]]:
    """The signals that came meanwhile, which end nothing by themselves."""
    came: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        came.append(number)

    before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(args: argparse.Namespace) -> TapResult:
    """Captures until it is told to end, or its reader has gone."""
    if args.json and args.write == _STDOUT:
        raise UsageError("--json and -w - both want standard output: name a file")
    if args.snaplen and args.snaplen < _SNAPLEN_LEAST:
        raise UsageError(f"--snaplen {args.snaplen} is less than {_SNAPLEN_LEAST}")
    if args.pid is not None:
        _check_pid(args.pid)
    with _until_signal() as came:
        return _capture(args, came)


def _follow(
    session: Session, args: argparse.Namespace, began: float, came: list[int]
) -> None:
    """From the first look to the last."""
    totals = session.sink.totals
    session.begin()
    who = "" if os.geteuid() == 0 else " (programs of this user)"
    _tell(f"capturing{who}; Ctrl-C ends it")

    def done() -> bool:
        return bool(
            came
            or (args.count and totals.packets >= args.count)
            or (args.seconds and time.monotonic() - began >= args.seconds)
        )

    session.run(done)
    session.end()
    if session.denied and not totals.packets:
        raise CannotRun("no memory could be read of what was to be captured")
    session.sink.writer.statistics(
        time.time_ns(),
        totals.packets + totals.gaps,
        totals.gaps,
        f"kmap: {totals.lost_bytes} bytes are lost in {totals.gaps} gaps",
    )


def _capture(args: argparse.Namespace, came: list[int]) -> TapResult:
    began = time.monotonic()
    totals = None
    try:
        with _output(args.write) as file:
            sink = Sink(Writer(file, f"kmap {__version__}", "kmap"), args.snaplen)
            totals = sink.totals
            session = Session(
                sink,
                Filter(args.pid, args.port, args.comm),
                args.interval / 1e6,
                _tell,
            )
            try:
                _follow(session, args, began, came)
            finally:
                session.close()
    except BrokenPipeError:
        # The reader has seen enough, or has ended.
        if totals is None:
            raise
    except EOFError as error:
        raise CommandFailed(str(error)) from error
    except OSError as error:
        raise CommandFailed(f"cannot write {args.write}: {error.strerror}") from error
    result = TapResult(
        file=args.write,
        seconds=time.monotonic() - began,
        connections=totals.connections,
        packets=totals.packets,
        bytes=totals.bytes,
        gaps=totals.gaps,
        lost_bytes=totals.lost_bytes,
    )
    return result


@renders(TapResult)
def _render(result: TapResult, _: Console) -> None:
    # Standard output may be the capture itself.
    console = Console(stderr=True)
    console.print(
        f"{result.packets} packets of {result.connections} connections, "
        f"{byte_count(result.bytes)} bytes of payload"
    )
    if result.gaps:
        console.print(
            f"{byte_count(result.lost_bytes)} bytes lost in {result.gaps} gaps: they "
            "were gone before they were copied (docs/tap.md)"
        )
