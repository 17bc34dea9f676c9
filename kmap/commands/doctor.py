# SPDX-License-Identifier: Apache-2.0
"""``kmap doctor``: can this host, a program or a process use Kmap, and what if not."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from kmap.doctor import host, process, program
from kmap.doctor.check import Check, State, worst
from kmap.render import printable, renders
from kmap.results import (
    EXIT_FAILED,
    EXIT_OK,
    JsonObject,
    SubParsers,
    UsageError,
    command_parser,
)


@dataclass(frozen=True)
class DoctorResult:
    """All checks, in the order in which they are worth reading."""

    checks: tuple[Check, ...]

    @property
    def state(self) -> State:
        """The worst of all."""
        return worst(self.checks)

    @property
    def exit_code(self) -> int:
        return EXIT_FAILED if self.state is State.CANNOT else EXIT_OK

    def to_json(self) -> JsonObject:
        return {
            "schema": "kmap.doctor/1",
            "ok": self.exit_code == EXIT_OK,
            "state": self.state.value,
            "checks": [
                {
                    "subject": check.subject,
                    "name": check.name,
                    "state": check.state.value,
                    "found": check.found,
                    "remedy": check.remedy,
                }
                for check in self.checks
            ],
        }


def add_parser(subparsers: SubParsers) -> None:
    """Adds the parser of this command."""
    parser = command_parser(
        subparsers,
        "doctor",
        run,
        help="say whether this host, a program or a process can use Kmap",
        description="Checks this host, and a program's file or a process if one is "
        "named.  A line for each\ncheck: ok, limited or cannot, what was found, and "
        "the remedy.  The host is tried\nout by a connection of a small program; a "
        "program that is named is not started.",
        epilog="Exit codes: 0 all is ok or limited, 1 something says cannot.",
    )
    parser.add_argument(
        "what",
        nargs="?",
        metavar="PROGRAM|PID",
        help="a program, in PATH or by its path, or the number of a process",
    )
    parser.add_argument(
        "--peer",
        type=int,
        metavar="PID",
        help="a process at the other end: can the two share a connection",
    )
    parser.add_argument(
        "--envoy-config",
        metavar="FILE",
        help="the bootstrap that the program, an Envoy, is to run with: does it use "
        "io_uring",
    )


def run(args: argparse.Namespace) -> DoctorResult:
    """Makes the checks."""
    pid = None
    if args.what is not None and args.what.isascii() and args.what.isdigit():
        pid = int(args.what)
    if args.peer is not None and pid is None:
        raise UsageError("--peer goes with a process: kmap doctor PID --peer PID")
    if args.envoy_config is not None and (args.what is None or pid is not None):
        raise UsageError(
            "--envoy-config goes with a program: kmap doctor envoy --envoy-config FILE"
        )
    # First, because who misspelt a name need not wait for the rest.
    about: list[Check] = []
    if pid is not None:
        about = process.check(pid, peer=args.peer)
    elif args.what is not None:
        about = program.check(args.what, envoy_config=args.envoy_config)
    return DoctorResult((*host.check(), *about))


_STYLES = {State.OK: "green", State.LIMITED: "yellow", State.CANNOT: "red"}
_SUMMARIES = {
    State.OK: "ok: nothing is in the way",
    State.LIMITED: "limited: it works, see above",
    State.CANNOT: "cannot: connections stay on the kernel, see above",
}


@renders(DoctorResult)
def _render(result: DoctorResult, console: Console) -> None:
    wide = max(len(check.name) for check in result.checks)
    subjects = max(len(check.subject) for check in result.checks)
    for check in result.checks:
        line = Text(f"{check.state.value:<8}", style=_STYLES[check.state])
        line.append(f"{printable(check.subject):<{subjects}}  ", style="bold")
        line.append(f"{check.name:<{wide}}  {printable(check.found)}", style="default")
        if check.remedy:
            line.append(f"  -> {printable(check.remedy)}", style="dim")
        console.print(line, soft_wrap=True, highlight=False)
    console.print(
        Text(_SUMMARIES[result.state], style=_STYLES[result.state]), soft_wrap=True
    )
