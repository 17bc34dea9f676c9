# SPDX-License-Identifier: Apache-2.0
"""What every command is and returns.

A command is a module of :mod:`kmap.commands` with two functions::

    def add_parser(subparsers: SubParsers) -> None: ...
    def run(args: argparse.Namespace) -> Result: ...

``add_parser`` adds exactly one parser through :func:`command_parser`.  ``run``
computes and returns a frozen dataclass that satisfies :class:`Result`; it never
prints a result.  :mod:`kmap.render` shows results on a terminal, and
``kmap --json`` prints ``to_json()`` as the only document on standard output.
Progress goes to standard error, and only when that is a terminal.

A command that cannot do its work raises :class:`CannotRun` or
:class:`UsageError`; :mod:`kmap.cli` turns these into messages and exit codes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, Protocol

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_CANNOT_RUN = 77

JsonObject = dict[str, Any]


class Result(Protocol):
    """What ``run`` returns; implementations are frozen dataclasses."""

    @property
    def exit_code(self) -> int:
        """0 done, 1 the thing checked failed."""

    def to_json(self) -> JsonObject:
        """One document, with ``schema`` (``kmap.NAME/1``) and ``ok``."""


class CannotRun(Exception):
    """This machine lacks something; the message names it and the remedy."""


class UsageError(Exception):
    """The command line asks for something that makes no sense."""


class CommandFailed(Exception):
    """The thing that was asked about does not exist or does not work."""


RunFunction = Callable[[argparse.Namespace], Result]
# argparse does not name this type in public.
SubParsers = Any


def command_parser(
    subparsers: SubParsers,
    name: str,
    run: RunFunction,
    *,
    help: str,
    description: str | None = None,
    epilog: str | None = None,
    json: bool = True,
) -> argparse.ArgumentParser:
    """Adds the parser of one command, with ``--json`` unless it is told not to."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=help,
        description=description or help,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if json:
        parser.add_argument(
            "--json",
            action="store_true",
            help="print exactly one JSON document on standard output",
        )
    parser.set_defaults(run=run)
    return parser


_SHORTEST_INTERVAL_S = 0.1


def _interval(text: str) -> float:
    seconds = float(text)
    if not _SHORTEST_INTERVAL_S <= seconds <= 86_400:
        raise ValueError(text)
    return seconds


def interval_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--interval``, seconds between two looks of a command that looks again."""
    parser.add_argument(
        "--interval",
        type=_interval,
        default=1.0,
        metavar="SECONDS",
        help="between two looks (default 1, at least 0.1)",
    )
