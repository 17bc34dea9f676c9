# SPDX-License-Identifier: Apache-2.0
"""Shows results on a terminal.

A renderer is registered for a result type by the module that defines it::

    @renders(DemoResult)
    def _render(result: DemoResult, console: Console) -> None: ...

so that this module imports no command.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

from rich.console import Console

from kmap.results import Result

T = TypeVar("T")
_renderers: dict[type[Any], Callable[[Any, Console], None]] = {}


def renders(
    kind: type[T],
) -> Callable[[Callable[[T, Console], None]], Callable[[T, Console], None]]:
    """Registers the decorated function as the renderer of results of type kind."""

    def register(
        function: Callable[[T, Console], None],
    ) -> Callable[[T, Console], None]:
        _renderers[kind] = function
        return function

    return register


def render(result: Result, console: Console) -> None:
    """Shows result with the renderer registered for its exact type."""
    renderer = _renderers.get(type(result))
    if renderer is None:
        raise LookupError(f"no renderer is registered for {type(result).__name__}")
    renderer(result, console)


def picture(svg: str) -> str:
    """A picture that rich or textual made, without the fonts that it would fetch."""
    return re.sub(r"@font-face\s*\{[^}]*\}", "", svg)


def printable(text: str) -> str:
    """On one line and without control characters: a program chooses its own name."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else "?" for each in text)


def byte_count(count: int | None) -> str:
    """A count of bytes as people read it; empty when it is not known."""
    if count is None:
        return ""
    value = float(count)
    for unit in ("", "K", "M", "G", "T"):
        if value < 1000 or unit == "T":
            return f"{count}" if not unit else f"{value:.1f}{unit}"
        value /= 1000
    raise AssertionError("unreachable")


def count(value: float | None) -> str:
    """A number as people read it; empty when it is not known."""
    return byte_count(None if value is None else int(value))
