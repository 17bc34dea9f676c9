# SPDX-License-Identifier: Apache-2.0
"""``kmap trace``: one request call by call, without and with Kmap, and its figures."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kmap import native
from kmap.demo import cpu, programs
from kmap.demo.children import none_left
from kmap.demo.syscalls import Calls
from kmap.demo.wrk import LOADS
from kmap.progress import orderly_end, progress_bar
from kmap.render import renders
from kmap.results import (
    EXIT_FAILED,
    EXIT_OK,
    JsonObject,
    Result,
    SubParsers,
    UsageError,
    command_parser,
)
from kmap.trace import draw, recording, session, share, tables
from kmap.trace.recording import ANSWERED, RING, Recording, Side
from kmap.trace.share import Shares

_REQUESTS = 15
_BODY = 128
_SECONDS = 3
_ROUNDS = 3
_MOST_REQUESTS = 200
_MOST_BODY = 16 << 20
RECORDING_FILE = "recording.json"
CPU_FILE = f"{share.NAME}.json"


def add_parser(subparsers: SubParsers) -> None:
    """Adds the parser of this command."""
    parser = command_parser(
        subparsers,
        "trace",
        run,
        help="record every call of one request, without and with Kmap, and draw it",
        description="Has the kernel record every system call that one request causes "
        "in the client, Envoy\nand the service (nginx), on warm connections: first "
        "without Kmap, and then with it,\nwhere the calls of the library are recorded "
        "too.  More requests are recorded while strace\nwatches them, and both have to "
        "count the same.  Needs root.",
        epilog="CMD is a client in the place of kmap's own, such as curl -s {url}; "
        "{url} and {port} become\nthe address of this command's Envoy.  Without them "
        "CMD talks to programs that run\nalready, named with --server.  CMD is run "
        "once for each request, all of it is recorded,\nand a connection that it uses "
        "once stays on the kernel.\n\nExit codes: 1 when strace or the library counted "
        "something else; 77 when the kernel does\nnot let this user record.",
    )
    parser.add_argument("client", nargs="*", metavar="CMD")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"write {RECORDING_FILE}, its tables, and figure1 and figure2 as SVG and "
        "PNG there",
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help=f"record nothing: draw {RECORDING_FILE} or {CPU_FILE} again",
    )
    parser.add_argument(
        "--figure2-cpu",
        action="store_true",
        help="instead of a request: CPU time of a request by group, from perf's "
        "samples of Envoy and nginx under load",
    )
    parser.add_argument(
        "--requests",
        type=int,
        metavar="N",
        help="record so many, and show what most of them did (default "
        f"{_REQUESTS}, of CMD 3)",
    )
    parser.add_argument(
        "--body",
        type=int,
        default=_BODY,
        metavar="BYTES",
        help="of the response (default %(default)s)",
    )
    parser.add_argument(
        "--server",
        type=int,
        action="append",
        default=[],
        metavar="PID",
        help="a process that serves CMD, to be recorded, too; may be repeated",
    )
    parser.add_argument(
        "--cpus",
        metavar="LIST",
        help="pin the programs to these CPUs, such as 0 or 0,2-3, or all for no "
        "pinning (default: the last one)",
    )
    parser.add_argument(
        "--no-strace", action="store_true", help="do not hold it against strace"
    )
    parser.add_argument(
        "--load",
        default="http-128",
        choices=LOADS,
        help="of --figure2-cpu (default %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=int,
        default=_SECONDS,
        metavar="S",
        help="of each set-up in each round of --figure2-cpu (default %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=_ROUNDS,
        metavar="N",
        help="how often the set-ups of --figure2-cpu take turns (default %(default)s)",
    )


@dataclass(frozen=True)
class TraceResult:
    """One request in both set-ups."""

    recording: Recording
    problems: tuple[str, ...]
    files: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """1 when others saw another request than was recorded."""
        return EXIT_FAILED if self.problems else EXIT_OK

    def to_json(self) -> JsonObject:
        """One document."""
        return {
            "schema": "kmap.trace/1",
            "ok": not self.problems,
            "problems": list(self.problems),
            "counts": {
                side.setup: {role: _row(side, role) for role in side.roles}
                for side in self.recording.sides
            },
            "recording": self.recording.to_json(),
            "files": list(self.files),
        }


@dataclass(frozen=True)
class CpuResult:
    """CPU time of a request, by group."""

    shares: Shares
    files: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """There is nothing to check."""
        return EXIT_OK

    def to_json(self) -> JsonObject:
        """One document."""
        return {
            "schema": "kmap.trace/1",
            "ok": True,
            "cpu": self.shares.to_json(),
            "files": list(self.files),
        }


def _row(side: Side, role: str) -> JsonObject:
    row: JsonObject = dataclasses.asdict(side.count(role))
    row["ring"] = len(side.of(role, RING))
    row["answered"] = len(side.of(role, ANSWERED))
    if side.strace is not None:
        row["strace"] = dataclasses.asdict(side.strace.calls[role])
        row["agrees"] = side.agrees(role)
    return row


def _plan(args: argparse.Namespace) -> session.Plan:
    plan = session.Plan(
        command=tuple(args.client),
        servers=tuple(args.server),
        body_bytes=args.body,
        requests=args.requests or (3 if args.client else _REQUESTS),
        cpus=cpu.parse_cpus(args.cpus),
        strace=not args.no_strace,
    )
    if not 1 <= plan.requests <= _MOST_REQUESTS:
        raise UsageError(f"--requests {plan.requests}: from 1 to {_MOST_REQUESTS}")
    if not 0 <= plan.body_bytes <= _MOST_BODY:
        raise UsageError(f"--body {plan.body_bytes}: from 0 to {_MOST_BODY}")
    if plan.servers and plan.uses_rig:
        raise UsageError(
            "--server is for a CMD that talks to programs of yours: leave {url} and "
            "{port} out of it"
        )
    if plan.command and not plan.uses_rig and not plan.servers:
        raise UsageError(
            "CMD names neither {url} nor {port}, so name who serves it: --server PID"
        )
    return plan


def _prepare(directory: Path | None) -> None:
    # Better now than after the recording.
    if directory is None:
        return
    draw.check()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {directory}: {error.strerror}") from error
    if not os.access(directory, os.W_OK):
        raise UsageError(f"--out {directory}: it cannot be written to")


def _write_text(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


def _write(file: Path, document: JsonObject) -> Path:
    return _write_text(file, json.dumps(document, indent=1) + "\n")


def _traced(found: Recording, out: Path | None, *, keep: bool) -> TraceResult:
    files: list[Path] = []
    if out is not None:
        if keep:
            files.append(_write(out / RECORDING_FILE, found.to_json()))
        files += draw.draw_all(found, out)
        text = f"{tables.counts(found)}\n{tables.calls(found)}"
        files.append(_write_text(out / "trace.md", text))
    problems = [problem for side in found.sides for problem in side.problems()]
    return TraceResult(found, tuple(problems), tuple(map(str, files)))


def _shared(found: Shares, out: Path | None, *, keep: bool) -> CpuResult:
    files: list[Path] = []
    if out is not None:
        if keep:
            files.append(_write(out / CPU_FILE, found.to_json()))
        files += share.draw_all(found, out)
        files.append(_write_text(out / f"{share.NAME}.md", tables.shares(found)))
    return CpuResult(found, tuple(map(str, files)))


def _again(args: argparse.Namespace) -> Result:
    if args.client or args.figure2_cpu:
        raise UsageError("--from records nothing: leave CMD and --figure2-cpu out")
    top = recording.document(args.source)
    schema = top.member("schema").text((recording.SCHEMA, share.SCHEMA))
    out: Path = args.out if args.out is not None else args.source.parent
    if schema == share.SCHEMA:
        shares = share.read(top)
        _prepare(out)
        return _shared(shares, out, keep=False)
    found = recording.read(top)
    _prepare(out)
    return _traced(found, out, keep=False)


def run(args: argparse.Namespace) -> Result:
    """Records a request, samples a load, or draws what was recorded before."""
    if args.source is not None:
        return _again(args)
    if args.figure2_cpu:
        if args.client:
            raise UsageError("--figure2-cpu has a load of its own: leave CMD out")
        if args.seconds < 1 or args.rounds < 1:
            raise UsageError("--seconds and --rounds are at least 1")
        cpus = cpu.parse_cpus(args.cpus) or frozenset(os.sched_getaffinity(0))
        _prepare(args.out)
        with orderly_end(), none_left(), progress_bar(2 * args.rounds) as progress:
            shares = share.measure(args.load, args.seconds, args.rounds, cpus, progress)
        return _shared(shares, args.out, keep=True)
    plan = _plan(args)
    native.preload_path()
    found = programs.find_all() if plan.uses_rig else None
    _prepare(args.out)
    with (
        orderly_end(),
        none_left(),
        tempfile.TemporaryDirectory(prefix="kmap-trace-") as directory,
        progress_bar(plan.steps) as progress,
    ):
        made = session.run(found, plan, Path(directory), progress)
    return _traced(made, args.out, keep=True)


def _cell(count: int, other: int | None) -> str:
    return str(count) if other in (None, count) else f"{count} ({other})"


def _calls_cells(here: Calls, there: Calls | None) -> list[str]:
    pairs = zip(
        dataclasses.astuple(here),
        dataclasses.astuple(there) if there is not None else (None,) * 4,
        strict=True,
    )
    return [_cell(*pair) for pair in pairs]


@renders(TraceResult)
def _render(result: TraceResult, console: Console) -> None:
    for side in result.recording.sides:
        title = tables.TITLES[side.setup]
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        table.add_column("program")
        for name in (*tables.KINDS, "by ring"):
            table.add_column(name, justify="right")
        for role in side.roles:
            there = side.strace.calls[role] if side.strace is not None else None
            ring = str(len(side.of(role, RING, ANSWERED)))
            table.add_row(role, *_calls_cells(side.count(role), there), ring)
        table.add_row("all", *_calls_cells(side.count_all(), None), "")
        console.print(table)
        spread = side.spread
        console.print(
            f"{spread.alike} of {spread.requests} requests made these calls; all of "
            f"them: {tables.ranges(side)}",
            soft_wrap=True,
        )
        if side.strace is None:
            console.print("not compared with strace")
        else:
            console.print(
                f"strace counted the same in {side.strace.agree} of "
                f"{side.strace.requests} requests that both saw"
            )
        for hop, count in side.ring_bytes.items():
            console.print(f"by ring, {hop}: {count} bytes")
        console.print()
    console.print(
        "Brackets: what most requests did under strace, which slows the programs down."
    )
    for problem in result.problems:
        console.print(f"FAILED {problem}", markup=False, soft_wrap=True)
    for file in result.files:
        console.print(f"wrote {file}", markup=False)


@renders(CpuResult)
def _render_cpu(result: CpuResult, console: Console) -> None:
    bars = result.shares.bars
    table = Table(title=f"{result.shares.load}, CPU us per request", box=None)
    table.add_column("group")
    for bar in bars:
        table.add_column(f"{share.PROGRAMS[bar.program]}, {bar.setup}", justify="right")
    for name, (title, _) in reversed(share.GROUPS.items()):
        table.add_row(title, *(f"{bar.groups[name]:.2f}" for bar in bars))
    table.add_row("all", *(f"{bar.total:.2f}" for bar in bars))
    table.add_row(
        "by round", *(f"{min(bar.rounds):.1f}-{max(bar.rounds):.1f}" for bar in bars)
    )
    table.add_row("samples", *(str(bar.samples) for bar in bars))
    console.print(table)
    for file in result.files:
        console.print(f"wrote {file}", markup=False)
