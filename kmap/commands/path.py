# SPDX-License-Identifier: Apache-2.0
"""``kmap path``: where the libraries are, for those who set LD_PRELOAD themselves."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from kmap import native
from kmap.render import renders
from kmap.results import EXIT_OK, CannotRun, JsonObject, SubParsers, command_parser


@dataclass(frozen=True)
class PathResult:
    """The libraries and what they speak; shown is the path that was asked for."""

    shown: str
    directory: str
    preload: str
    musl: str | None
    library: str
    abi: int
    wire: int

    @property
    def exit_code(self) -> int:
        return EXIT_OK

    def to_json(self) -> JsonObject:
        return {"schema": "kmap.path/1", "ok": True, **asdict(self)}


def add_parser(subparsers: SubParsers) -> None:
    """Adds the parser of this command."""
    parser = command_parser(
        subparsers,
        "path",
        run,
        help="print the path of the preload library",
        description="Prints the path of the preload library, so that "
        'LD_PRELOAD="$(kmap path)" CMD\nis the same as kmap run -- CMD.',
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--musl",
        action="store_true",
        help="the library for programs on musl, as in Alpine's images",
    )
    which.add_argument(
        "--dir",
        action="store_true",
        help="the directory with all libraries, to mount or to copy into containers",
    )


def _musl_path() -> Path | None:
    try:
        return native.musl_path()
    except CannotRun:
        return None


def run(args: argparse.Namespace) -> PathResult:
    """Finds and loads the installed libraries."""
    lib = native.library()
    preload = native.preload_path()
    shown = preload
    if args.musl:
        shown = native.musl_path()
    elif args.dir:
        shown = preload.parent
    musl = _musl_path()
    return PathResult(
        shown=str(shown),
        directory=str(preload.parent),
        preload=str(preload),
        musl=str(musl) if musl else None,
        library=str(native.library_path()),
        abi=lib.kmap_abi_version(),
        wire=lib.kmap_wire_version(),
    )


@renders(PathResult)
def _render(result: PathResult, console: Console) -> None:
    # Not print(): rich would wrap a long path.
    console.out(result.shown, highlight=False)
