# SPDX-License-Identifier: Apache-2.0
"""``kmap demo``: real Envoy, nginx and wrk, on kernel TCP and under Kmap."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from kmap.demo import cpu, figures, programs, session
from kmap.demo.figures import DemoResult
from kmap.demo.rig import Setup
from kmap.demo.wrk import LOADS
from kmap.progress import orderly_end, progress_bar
from kmap.results import SubParsers, UsageError, command_parser

_SETUPS = {setup.value: setup for setup in Setup}
# 4 loads, 3 set-ups and 3 rounds of this many seconds are three minutes.
_SECONDS = 5
_ROUNDS = 3


def add_parser(subparsers: SubParsers) -> None:
    """Adds the parser of this command."""
    parser = command_parser(
        subparsers,
        "demo",
        run,
        help="run Envoy, nginx and wrk with and without Kmap, side by side",
        description="Runs real programs: wrk as the client, Envoy as the proxy and "
        "nginx as the service,\nfirst comparing bodies byte by byte, then measuring "
        "each load on kernel TCP, with a\nUnix socket between Envoy and nginx, and "
        "under Kmap, interleaved.  Takes about four\nminutes.",
        epilog="It fails (exit code 1) if a body differs, a request fails, Envoy does "
        "not end\nwith 0 on SIGTERM, or, in rows of 5 s or more, Kmap carries less "
        "than 99 % of\nthe bytes by ring or does not use less CPU per request than "
        "kernel TCP.",
    )
    parser.add_argument(
        "--duration",
        type=int,
        default=_SECONDS,
        metavar="S",
        help="seconds of each load on each set-up in each round (default %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=_ROUNDS,
        metavar="N",
        help="how often the set-ups take turns (default %(default)s)",
    )
    parser.add_argument(
        "--loads",
        default=",".join(LOADS),
        metavar="NAMES",
        help="comma-separated (default %(default)s)",
    )
    parser.add_argument(
        "--setups",
        default=",".join(_SETUPS),
        metavar="NAMES",
        help="comma-separated (default %(default)s)",
    )
    parser.add_argument(
        "--cpus",
        metavar="LIST",
        help="pin all three programs to these CPUs, such as 0 or 0,2-3, or all for no "
        "pinning (default: the last one, where CPU per request is steadiest)",
    )
    parser.add_argument(
        "--no-bodies", action="store_true", help="leave out the correctness pass"
    )
    parser.add_argument(
        "--no-calls", action="store_true", help="do not count system calls with strace"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write the figures there: demo.json, demo.md and the table as demo.svg",
    )


def _names(text: str, known: dict[str, object], option: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise UsageError(
            f"{option} {text}: unknown {', '.join(unknown) or 'nothing'}; there are "
            + ", ".join(known)
        )
    return list(dict.fromkeys(names))


def _write(result: DemoResult, directory: Path) -> DemoResult:
    directory.mkdir(parents=True, exist_ok=True)
    files = tuple(directory / f"demo.{kind}" for kind in ("json", "md", "svg"))
    result = dataclasses.replace(result, files=tuple(str(file) for file in files))
    files[0].write_text(json.dumps(result.to_json(), indent=2) + "\n")
    files[1].write_text(figures.markdown(result))
    files[2].write_text(figures.svg(result))
    return result


def run(args: argparse.Namespace) -> DemoResult:
    """Runs everything and returns what was found."""
    if args.duration < 1 or args.rounds < 1:
        raise UsageError("--duration and --rounds are at least 1")
    plan = session.Plan(
        loads=tuple(LOADS[n] for n in _names(args.loads, {**LOADS}, "--loads")),
        setups=tuple(_SETUPS[n] for n in _names(args.setups, {**_SETUPS}, "--setups")),
        rounds=args.rounds,
        seconds=args.duration,
        cpus=cpu.parse_cpus(args.cpus),
        bodies=not args.no_bodies,
        calls=not args.no_calls,
    )
    found = programs.find_all()
    if args.out is not None:
        # Better now than after four minutes.
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {args.out}: {error.strerror}") from error
    with orderly_end(), tempfile.TemporaryDirectory(prefix="kmap-demo-") as directory:
        with progress_bar(plan.steps) as progress:
            result = session.run(found, plan, Path(directory), progress)
    if args.out is not None:
        result = _write(result, args.out)
    return result
