# SPDX-License-Identifier: Apache-2.0
"""Draws a recorded request: every call an arrow, from the recording alone.

The programs stand side by side between the rings above them and the kernel below.  A
program's calls stand in its box in the order in which it made them; the numbers are the
order of all of them together.  The same recording always gives the same file.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kmap.results import CannotRun, UsageError
from kmap.trace.recording import (
    ANSWERED,
    OTHER,
    RING,
    STACK,
    WAIT,
    WAKE_UP,
    Call,
    Recording,
    Side,
)

SUFFIXES = (".svg", ".png")
TITLES = {
    "kernel": "Figure 1: one request without Kmap",
    "kmap": "Figure 2: the same request with Kmap",
}
_RED, _GREY, _ORANGE = "#c1121f", "#6c757d", "#d97706"
_INK, _PAPER, _GREEN = "#22272e", "#f4f4f1", "#e6f4ea"
_RINGS = ("#15803d", "#0f766e", "#4d7c0f", "#047857")
_COLOURS = {STACK: _RED, WAIT: _GREY, WAKE_UP: _ORANGE, ANSWERED: _RINGS[0]}
_NAMES = {"client": "client", "envoy": "Envoy", "service": "service"}
# Of a picture, in inches; a column of a paper is narrower, a page is not.
_WIDTH, _MARGIN, _GUTTER, _GAP, _PITCH = 7.2, 0.08, 0.75, 0.25, 0.2
# More than that is no figure any more, and wider than a PNG can be.
_MOST = 400
_DPI = 150
_OPTIONS: dict[str, Any] = {
    ".svg": {"metadata": {"Date": None}},
    ".png": {"metadata": {"Software": None}, "pil_kwargs": {"optimize": True}},
}
_TEXT, _SMALL = 6.5, 5.6


def check() -> None:
    """Better now than after the recording."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise CannotRun(
            "figures need matplotlib: pip install 'kmap[trace]' (in the source tree, "
            "pip install '.[trace]')"
        ) from None


def shown(side: Side) -> list[Call]:
    """The calls that a figure shows, in order."""
    return [call for call in side.calls if call.kind != OTHER]


def label(call: Call) -> str:
    """What stands at an arrow."""
    if call.result < 0:
        # A ring's answer comes as -1 and errno; there is one error without a kernel's.
        number = errno.EAGAIN if call.kind == RING else -call.result
        return f"{call.name} {errno.errorcode.get(number, str(-number))}"
    if call.way:
        return f"{call.name} {call.bytes} B"
    if call.kind == WAKE_UP and call.what != "futex":
        return f"{call.name} ({call.what})"
    if call.kind == WAIT and call.result == 0:
        return f"{call.name} 0"
    return call.name


@dataclass
class _Lane:
    """Where a program stands."""

    role: str
    calls: list[tuple[int, Call]]
    left: float = 0.0
    right: float = 0.0

    def at(self, place: int) -> float:
        """The middle of its column for a call."""
        return self.left + (self.right - self.left) * (place + 0.5) / max(
            1, len(self.calls)
        )


class _Figure:
    """One picture while it is drawn; y grows upwards, in inches."""

    def __init__(self, side: Side) -> None:
        from matplotlib.figure import Figure

        self.side = side
        numbered = list(enumerate(shown(side), 1))
        self.lanes = [
            _Lane(role, [each for each in numbered if each[1].role == role])
            for role in side.roles
        ]
        self.hops = list(
            dict.fromkeys(call.what for _, call in numbered if call.kind == RING)
        )
        self._above = any(call.kind in (RING, ANSWERED) for _, call in numbered)
        self._lay_out()
        self.figure = Figure(figsize=(self.width, self.height))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, self.width)
        self.axes.set_ylim(0, self.height)
        self.axes.axis("off")

    def _lay_out(self) -> None:
        columns = [max(2, len(lane.calls)) for lane in self.lanes]
        room = _WIDTH - 2 * _MARGIN - _GUTTER - _GAP * (len(self.lanes) - 1)
        pitch = max(_PITCH, room / sum(columns))
        x = _MARGIN + _GUTTER
        for lane, count in zip(self.lanes, columns, strict=True):
            lane.left, lane.right = x, x + pitch * count
            x = lane.right + _GAP
        self.width = x - _GAP + _MARGIN
        # From below: lines of text, the stack, waiting, labels, the programs.
        self.stack = (0.54, 0.9)
        self.waiting = (0.97, 1.23)
        self.border = 1.38
        self.programs = (2.48, 2.86)
        y = self.programs[1]
        self.rings = {}
        if self._above:
            y += 1.05
            for hop in self.hops:
                self.rings[hop] = (y, y + 0.24)
                y += 0.31
        self.height = y + 0.32

    def box(
        self,
        left: float,
        right: float,
        span: tuple[float, float],
        colour: str,
        *,
        edge: str = _INK,
        zorder: int = 1,
    ) -> None:
        """A box with round corners."""
        from matplotlib.patches import FancyBboxPatch

        self.axes.add_patch(
            FancyBboxPatch(
                (left, span[0]),
                right - left,
                span[1] - span[0],
                boxstyle="round,pad=0,rounding_size=0.05",
                facecolor=colour,
                edgecolor=edge,
                linewidth=0.7,
                zorder=zorder,
            )
        )

    def text(self, x: float, y: float, text: str, **kw: Any) -> None:
        """Text in the middle of a point, unless it is told otherwise."""
        kw.setdefault("fontsize", _TEXT)
        kw.setdefault("color", _INK)
        kw.setdefault("ha", "center")
        kw.setdefault("va", "center")
        # A name is not a formula, whatever is in it.
        self.axes.text(x, y, text, parse_math=False, **kw)

    def arrow(self, number: int, call: Call, x: float) -> None:
        """A call, from its program to where it goes."""
        colour = _COLOURS.get(call.kind, _RINGS[0])
        low, high = self.programs
        if call.kind == RING:
            colour = _RINGS[self.hops.index(call.what) % len(_RINGS)]
            start, end, edge = high, self.rings[call.what][0] + 0.07, high
        elif call.kind == ANSWERED:
            start, end, edge = high, high + 0.14, high
        elif call.kind == STACK:
            start, end, edge = low, self.stack[1] - 0.1, low
        else:
            start, end, edge = low, self.waiting[1] - 0.09, low
        # Bytes that come in go from there to the program.
        ends = (end, start) if call.way == "in" else (start, end)
        style = "-|>" if call.way or call.kind in (WAIT, WAKE_UP) else "-"
        if call.kind == WAIT:
            ends = (end, start)
        self.axes.annotate(
            "",
            xy=(x, ends[1]),
            xytext=(x, ends[0]),
            arrowprops={
                "arrowstyle": f"{style},head_width=0.18,head_length=0.36"
                if style != "-"
                else "-",
                "color": colour,
                "linewidth": 1.1,
                "linestyle": "-" if call.way or call.kind == WAKE_UP else (0, (3, 1.5)),
                "shrinkA": 0,
                "shrinkB": 0,
            },
            zorder=4,
        )
        up = edge == high
        self.text(
            x - 0.025,
            edge + 0.05 if up else edge - 0.05,
            label(call),
            rotation=90,
            ha="right",
            va="bottom" if up else "top",
            color=colour,
            zorder=5,
            gid=f"call-{number}",
        )
        self.text(
            x,
            high - 0.07 if up else low + 0.07,
            str(number),
            fontsize=_SMALL,
            color=colour,
            fontweight="bold",
            zorder=5,
        )

    def draw(self) -> None:
        """Everything."""
        left, right = _MARGIN, self.width - _MARGIN
        low, high = self.programs
        self.text(
            left, self.height - 0.14, TITLES[self.side.setup], ha="left", fontsize=9
        )
        for number, hop in enumerate(self.hops):
            reached = [
                lane
                for lane in self.lanes
                if any(call.what == hop and call.kind == RING for _, call in lane.calls)
            ]
            colour = _RINGS[number % len(_RINGS)]
            span = self.rings[hop]
            ends = reached[0].left, reached[-1].right
            self.box(*ends, span, _GREEN, edge=colour)
            words = f"two rings, {hop}: {self.side.carried.get(hop, 0)} B"
            self.text(
                sum(ends) / 2,
                sum(span) / 2 + 0.03,
                words,
                color=colour,
                zorder=6,
                bbox={"facecolor": _GREEN, "edgecolor": "none", "pad": 0.6},
            )
        for lane in self.lanes:
            self.box(lane.left, lane.right, self.programs, "#ffffff", zorder=2)
            name = _NAMES.get(lane.role, lane.role)
            middle = (lane.left + lane.right) / 2
            self.text(middle, (low + high) / 2, name, fontsize=8, zorder=5)
        self.axes.plot(
            (left, right), (self.border,) * 2, color=_INK, linewidth=0.6, linestyle=":"
        )
        inner = left + _GUTTER
        self.box(inner, right, self.waiting, _PAPER, edge=_GREY)
        self.box(inner, right, self.stack, "#fbe9e7", edge=_RED)
        layers = [
            ("programs", self.programs, _INK),
            ("waiting,\nwaking", self.waiting, _GREY),
            ("network\nstack", self.stack, _RED),
        ]
        if self.hops:
            tops = [self.rings[hop] for hop in self.hops]
            span = min(tops)[0], max(tops)[1]
            layers.append(("shared\nmemory", span, _RINGS[0]))
        for name, span, colour in layers:
            self.text(left, sum(span) / 2, name, ha="left", color=colour, fontsize=7)
        for name, y in (("user space", 0.07), ("kernel", -0.06)):
            self.text(left, self.border + y, name, ha="left", fontsize=_SMALL)
        for lane in self.lanes:
            for place, (number, call) in enumerate(lane.calls):
                self.arrow(number, call, lane.at(place))
        lines = (_summary(self.side), _LEGEND, _rest(self.side))
        for y, line in zip((0.4, 0.25, 0.11), lines, strict=True):
            small = {} if y > 0.3 else {"fontsize": _SMALL}
            self.text(left, y, line, ha="left", **small)


def _several(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _summary(side: Side) -> str:
    calls = shown(side)
    kinds = [call.kind for call in calls]
    parts = [
        _several(kinds.count(STACK), "call") + " into the network stack",
        _several(kinds.count(WAIT), "wait"),
    ]
    if kinds.count(WAKE_UP):
        parts.append(
            _several(kinds.count(WAKE_UP), "system call") + " to wake or be woken"
        )
    if kinds.count(RING):
        parts.append(f"{kinds.count(RING)} answered from rings, without a system call")
    return "; ".join(parts) + "."


_LEGEND = (
    "Numbers are the order of all calls. A solid arrow moves bytes, wakes or sleeps; a "
    "dashed one moves none."
)


def _rest(side: Side) -> str:
    several = _several(len(side.calls) - len(shown(side)), "other system call")
    spread = side.spread
    return (
        f"{several} (files, memory, pipes) not shown. {spread.alike} of "
        f"{spread.requests} requests made these calls."
    )


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Text stays text, and the same input gives the same bytes."""
    import matplotlib

    with matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "kmap",
            "font.family": "DejaVu Sans",
        }
    ):
        yield


def draw(side: Side, files: Iterable[Path]) -> None:
    """Writes the figure of one set-up, once for each file name."""
    count = len(shown(side))
    if count > _MOST:
        raise UsageError(
            f"the request made {count} calls and a figure shows at most {_MOST}: ask "
            "for a smaller one (--body), or read the recording"
        )
    with style():
        picture = _Figure(side)
        picture.draw()
        save(picture.figure, files)


def save(figure: Any, files: Iterable[Path]) -> None:
    """Writes a figure without the time of day in it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    for file in files:
        figure.savefig(file, dpi=_DPI, **_OPTIONS[file.suffix])


def draw_all(recording: Recording, directory: Path) -> Sequence[Path]:
    """Figure 1 and Figure 2 in a directory that exists, each as SVG and PNG."""
    files = []
    for number, side in enumerate(recording.sides, 1):
        named = [directory / f"figure{number}{suffix}" for suffix in SUFFIXES]
        draw(side, named)
        files += named
    return files
