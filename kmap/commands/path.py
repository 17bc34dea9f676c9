# SPDX-License-Identifier: Apache-2.0
"""``kmap path``: where the libraries are, for those who set LD_PRELOAD themselves."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass

from rich.console import Console

from kmap import native
from kmap.render import renders
from kmap.results import EXIT_OK, JsonObject, SubParsers, command_parser


@dataclass(frozen=True)
class PathResult:
    """Both libraries and what they speak."""

    preload: str
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
    command_parser(
        subparsers,
        "path",
        run,
        help="print the path of the preload library",
        description="Prints the path of the preload library, so that "
        'LD_PRELOAD="$(kmap path)" CMD\nis the same as kmap run -- CMD.',
    )


def run(args: argparse.Namespace) -> PathResult:
    """Finds and loads the installed libraries."""
    lib = native.library()
    return PathResult(
        preload=str(native.preload_path()),
        library=str(native.library_path()),
        abi=lib.kmap_abi_version(),
        wire=lib.kmap_wire_version(),
    )


@renders(PathResult)
def _render(result: PathResult, console: Console) -> None:
    # Not print(): rich would wrap a long path.
    console.out(result.preload, highlight=False)
