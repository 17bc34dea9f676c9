# SPDX-License-Identifier: Apache-2.0
"""Tables of very many lines: plain columns, in a thousandth of the time of rich's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.color import ColorSystem
from rich.console import Console


class Column(NamedTuple):
    """A heading; numbers are set against the right edge."""

    name: str
    right: bool = False


def lay_out(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[str]:
    """The heading and a line for each row, two blanks between columns."""
    table = [tuple(column.name for column in columns), *rows]
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    form = "  ".join(
        f"{{:{'>' if column.right else '<'}{width}}}"
        for column, width in zip(columns, widths, strict=True)
    )
    return [form.format(*cells).rstrip() for cells in table]


def color_system(console: Console) -> ColorSystem | None:
    """What the console can show; None where that is no colour."""
    name = console.color_system
    return ColorSystem[name.upper()] if name and console.is_terminal else None
