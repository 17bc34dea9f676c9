# SPDX-License-Identifier: Apache-2.0
"""For commands that take long: a bar on a terminal, and an end in order."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

# What is being done, or None when one step is.
Progress = Callable[[str | None], None]


class _Ended(SystemExit):
    """SIGTERM or SIGHUP came: leave in order, so that no child stays."""


@contextlib.contextmanager
def orderly_end() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into an exception, so that children are ended."""

    def end(number: int, frame: FrameType | None) -> None:
        raise _Ended(128 + number)

    caught = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, end) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def progress_bar(steps: int) -> Iterator[Progress]:
    """A bar of so many steps on standard error, if that is a terminal."""
    console = Console(stderr=True)
    with Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("", total=steps)

        def step(text: str | None) -> None:
            if text is None:
                bar.advance(task)
            else:
                bar.update(task, description=text)

        yield step
