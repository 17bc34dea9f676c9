# SPDX-License-Identifier: Apache-2.0
"""``kmap help TOPIC``: the pages of docs/ in the terminal."""

from __future__ import annotations

import argparse
import difflib
import importlib.resources
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from kmap.render import renders
from kmap.results import EXIT_OK, CannotRun, JsonObject, SubParsers, UsageError
from kmap.results import command_parser as _command_parser


@dataclass(frozen=True)
class HelpResult:
    """One page, or without a topic the topics and their titles."""

    topic: str | None
    text: str
    topics: dict[str, str]

    @property
    def exit_code(self) -> int:
        return EXIT_OK

    def to_json(self) -> JsonObject:
        return {
            "schema": "kmap.help/1",
            "ok": True,
            "topic": self.topic,
            "text": self.text,
            "topics": self.topics,
        }


def add_parser(subparsers: SubParsers) -> None:
    """Adds the parser of this command."""
    parser = _command_parser(
        subparsers,
        "help",
        run,
        help="show a page of the documentation",
        description="Shows a page of the documentation of this version; without a "
        "TOPIC lists them.",
    )
    parser.add_argument("topic", nargs="?", metavar="TOPIC", help="such as limits")


def _directory() -> Path:
    package = Path(str(importlib.resources.files("kmap")))
    # Installed, and in the source tree.
    for path in (package / "docs", package.parent / "docs"):
        if (path / "architecture.md").is_file():
            return path
    raise CannotRun(
        f"{package / 'docs'} does not exist: install the package with 'pip install .'"
    )


def _title(page: Path) -> str:
    with page.open(encoding="utf-8") as file:
        for line in file:
            if line.startswith("# "):
                return line[2:].rstrip()
    return page.stem


def run(args: argparse.Namespace) -> HelpResult:
    """Finds the page."""
    pages = {path.stem: path for path in sorted(_directory().glob("*.md"))}
    pages.pop("index", None)
    topics = {name: _title(path) for name, path in pages.items()}
    if args.topic is None:
        return HelpResult(None, "", topics)
    name = args.topic.removesuffix(".md")
    if name not in pages:
        near = difflib.get_close_matches(name, pages, 1)
        hint = f"; did you mean {near[0]}?" if near else ";"
        raise UsageError(f"there is no topic {name}{hint} kmap help lists all of them")
    return HelpResult(name, pages[name].read_text(encoding="utf-8"), topics)


@renders(HelpResult)
def _render(result: HelpResult, console: Console) -> None:
    if result.topic is None:
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, title in result.topics.items():
            table.add_row(name, title)
        console.print(table)
        return
    page = Markdown(result.text, hyperlinks=False)
    if console.is_terminal:
        with console.pager(styles=True):
            console.print(page)
    else:
        console.out(result.text, end="", highlight=False)
