# SPDX-License-Identifier: Apache-2.0
"""``kmap stress``: seeded stress with fault injection; :mod:`kmap.stress` does it."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kmap import launch, native
from kmap.render import byte_count, renders
from kmap.results import SubParsers, UsageError, command_parser
from kmap.stress.fallback import COMPARED
from kmap.stress.faults import FAULTS, KINDS
from kmap.stress.session import (
    DEFAULT_TRANSPORT,
    LEVELS,
    Options,
    Session,
    StressResult,
    Tally,
)


def _kinds() -> str:
    """The kinds of fault, one paragraph each."""
    width = max(map(len, FAULTS)) + 4
    lines = ["kinds of fault:"]
    for kind in KINDS.values():
        text = textwrap.wrap(kind.meaning, 88 - width)
        text += [f"(counted: {kind.counts}{'; also on rings' if kind.ring else ''})"]
        lines.append(f"  {kind.name:{width - 2}}{text[0]}")
        lines += [" " * width + line for line in text[1:]]
    return "\n".join(lines)


def add_parser(subparsers: SubParsers) -> None:
    """Adds the parser of this command."""
    parser = command_parser(
        subparsers,
        "stress",
        run,
        help="exchange verified bytes under faults",
        description="Pairs of programs exchange byte streams in which every byte is "
        "verified, while\npeers are killed, stopped and replaced, buffers fill up and "
        "upgrades are refused.\nWhat happens follows from the seed.  The first failure "
        "ends the run, with a line\nthat replays it.",
        epilog=_kinds(),
    )
    parser.add_argument(
        "--duration",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="how long to run (default: %(default)g)",
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="what decides all (default: %(default)s)"
    )
    parser.add_argument(
        "--faults",
        default="all",
        metavar="KINDS",
        help="all, none, or some of the kinds below, with commas (default: all)",
    )
    parser.add_argument(
        "--at-least",
        type=int,
        default=0,
        metavar="N",
        help="go on until each of these kinds has been counted N times, however long "
        "that takes (default: %(default)s)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=2,
        metavar="N",
        help="pairs of programs at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--level",
        choices=(*LEVELS, "both"),
        default="both",
        help="ring: the rings through the C ABI; socket: programs under Kmap "
        "(default: both; the figures are then those of the sockets)",
    )
    parser.add_argument(
        "--transport",
        default=DEFAULT_TRANSPORT,
        metavar="NAME",
        help="what carries the bytes of the programs under Kmap; with another than the "
        "default only the socket level runs (default: %(default)s)",
    )
    parser.add_argument(
        "--verify-fallback",
        action="store_true",
        help="instead, compare how each kind of fault ends with and without Kmap",
    )
    parser.add_argument(
        "--kernel",
        action="store_true",
        help="socket level without the library: the kernel vouches for this tool",
    )
    parser.add_argument(
        "--case",
        metavar="JOB:NUMBER",
        help="run this one case of one level again and again",
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="nothing moved for this long is a hang (default: %(default)g)",
    )


def _options(args: argparse.Namespace) -> Options:
    faults: tuple[str, ...] = FAULTS
    if args.faults == "all":
        pass
    elif args.faults == "none":
        faults = ()
    else:
        asked = args.faults.split(",")
        unknown = sorted(set(asked) - set(FAULTS))
        if unknown:
            raise UsageError(
                f"--faults {','.join(unknown)}: the kinds are {', '.join(FAULTS)}"
            )
        faults = tuple(kind for kind in FAULTS if kind in asked)
    if args.jobs < 1:
        raise UsageError(f"--jobs {args.jobs}: at least one is needed")
    if args.duration <= 0 or args.patience <= 0:
        raise UsageError("--duration and --patience are more than 0 seconds")
    case = None
    if args.case is not None:
        match = re.fullmatch(r"(\d+):(\d+)", args.case)
        if match is None:
            raise UsageError(f"--case {args.case}: it is JOB:NUMBER, such as 0:17")
        if args.level == "both":
            raise UsageError("--case needs --level ring or --level socket")
        case = (int(match[1]), int(match[2]))
    levels: tuple[str, ...] = LEVELS if args.level == "both" else (args.level,)
    if args.kernel:
        if args.level == "ring":
            raise UsageError("--kernel is about sockets, and --level ring has none")
        levels = ("socket",)
    if launch.transport(args.transport) != DEFAULT_TRANSPORT:
        if args.kernel or args.level == "ring":
            raise UsageError(
                f"--transport {args.transport} is about programs under Kmap: it goes "
                "with neither --kernel nor --level ring"
            )
        levels = ("socket",)
    if args.verify_fallback:
        if args.kernel or args.case or args.level == "ring" or not faults:
            raise UsageError(
                "--verify-fallback compares sockets with the kernel under faults: it "
                "goes with neither --kernel, --case, --level ring nor --faults none"
            )
        if not set(faults) & COMPARED:
            raise UsageError(
                f"--verify-fallback compares {', '.join(sorted(COMPARED))}: name one"
            )
        levels = ("socket",)
    return Options(
        seed=args.seed,
        duration=args.duration,
        levels=levels,
        faults=faults,
        jobs=args.jobs,
        kernel=args.kernel,
        transport=args.transport,
        patience=args.patience,
        case=case,
        verify_fallback=args.verify_fallback,
        at_least=args.at_least,
    )


def run(args: argparse.Namespace) -> StressResult:
    """Stresses, with a progress bar on standard error if that is a terminal."""
    options = _options(args)
    # Found out before anything is started.
    if not options.kernel:
        native.library()
        native.preload_path()
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[counts]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        transient=True,
    )
    with progress:
        task = progress.add_task("stress", total=1.0, counts="")

        def watch(done: float, tally: Tally, level: str) -> None:
            counts = (
                f"{tally.connections} connections, {byte_count(tally.bytes)}B, "
                f"{sum(tally.faults.values())} faults"
            )
            progress.update(task, completed=done, description=level, counts=counts)

        result = Session(options, watch).run()
    if result.failures and args.json:
        # Standard output has the document; who watches the run wants this line.
        print(f"replay: {result.failures[0].replay}", file=sys.stderr)
    return result


def _counts_table(result: StressResult) -> Table:
    table = Table(title=f"stress, seed {result.options.seed}", title_justify="left")
    table.add_column("")
    kernel = " on the kernel" if result.options.kernel else ""
    for level in result.tallies:
        table.add_column(f"{level}{kernel}", justify="right")
    tallies = list(result.tallies.values())
    table.add_row("cases", *(str(tally.cases) for tally in tallies))
    table.add_row("connections", *(str(tally.connections) for tally in tallies))
    table.add_row("upgraded", *(str(tally.upgraded) for tally in tallies))
    table.add_row("bytes", *(f"{byte_count(tally.bytes)}B" for tally in tallies))
    table.add_row("by ring", *(_share(tally) for tally in tallies))
    for kind in FAULTS:
        table.add_row(kind, *(str(tally.faults[kind]) for tally in tallies))
    return table


def _share(tally: Tally) -> str:
    return f"{tally.ring_bytes / tally.bytes:.1%}" if tally.bytes else ""


def _fallback_table(result: StressResult) -> Table:
    table = Table(title="with and without Kmap", title_justify="left")
    for heading in ("scenario", "how it ends", "by ring", ""):
        table.add_column(heading)
    for line in result.fallback:
        ways = "\n".join(line.kernel)
        if line.kernel != line.kmap:
            ways = f"kernel: {ways}\nKmap: " + "\n".join(line.kmap)
        table.add_row(
            f"{line.fault}: {line.meaning}",
            ways,
            f"{line.upgraded}/{line.repetitions}",
            "same" if line.ok else "DIFFERS",
        )
    return table


@renders(StressResult)
def _render(result: StressResult, console: Console) -> None:
    if result.options.verify_fallback:
        console.print(_fallback_table(result))
        for line in result.fallback:
            for finding in line.findings:
                console.print(f"{line.scenario}: {finding}", markup=False)
    else:
        console.print(_counts_table(result))
    for failure in result.failures:
        console.print(
            f"{failure.kind} in {failure.level} case {failure.case}: {failure.detail}",
            markup=False,
            soft_wrap=True,
        )
    if result.failures:
        console.print(
            f"replay: {result.failures[0].replay}", markup=False, soft_wrap=True
        )
    console.print("ok" if result.ok else "FAILED")
