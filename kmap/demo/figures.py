# SPDX-License-Identifier: Apache-2.0
"""What the demo found, what it says about it, and the table."""

from __future__ import annotations

import dataclasses
import io
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console, JustifyMethod
from rich.table import Table

from kmap.render import picture, renders
from kmap.results import EXIT_FAILED, EXIT_OK, JsonObject

MINIMUM_RING_SHARE = 0.99
MINIMUM_BODIES_RING_SHARE = 0.90
# In shorter rows the bytes before the upgrade weigh too much.
JUDGED_FROM_S = 5.0
MAXIMUM_STEAL = 0.20


@dataclass(frozen=True)
class CpuPerRequest:
    """CPU microseconds per request, of each program and of all."""

    client: float
    envoy: float
    service: float
    total: float


@dataclass(frozen=True)
class SocketStates:
    """Ends of connections of the three programs, as ``kmap ss`` lists them."""

    ring: int
    pending: int
    kernel: int


@dataclass(frozen=True)
class Cell:
    """One load on one set-up in one round."""

    load: str
    setup: str
    round: int
    duration_s: float
    requests: int
    errors: int
    rps: float
    p50_us: float
    p99_us: float
    cpu: CpuPerRequest
    steal: float
    # Bytes on both hops, as Envoy counted them, and those that went by ring.
    client_hop_bytes: int
    client_hop_ring_bytes: int
    service_hop_bytes: int
    service_hop_ring_bytes: int
    sockets: SocketStates | None


@dataclass(frozen=True)
class CallsPerRequest:
    """System calls per request; see :mod:`kmap.demo.syscalls`."""

    stack: float
    client_stack: float
    envoy_stack: float
    service_stack: float
    waits: float
    doorbells: float
    futexes: float
    requests: int


@dataclass(frozen=True)
class Row:
    """One load on one set-up: sums and medians of its cells."""

    name: str
    setup: str
    duration_s: float
    requests: int
    errors: int
    rps: float
    p50_us: float
    p99_us: float
    cpu: CpuPerRequest
    # Kernel's CPU per request divided by this row's: the median of the rounds, and
    # their extremes.  None without a kernel row.
    gain: float | None
    gain_spread: tuple[float, float] | None
    # Rounds that were left out of gain because the hypervisor took the CPU away.
    left_out: int
    calls: CallsPerRequest | None
    ring_share: float
    client_hop_ring_share: float
    service_hop_ring_share: float
    sockets: SocketStates | None

    def to_json(self) -> JsonObject:
        """One element of "loads"."""
        return {
            "name": self.name,
            "setup": self.setup,
            "duration_s": round(self.duration_s, 3),
            "requests": self.requests,
            "errors": self.errors,
            "rps": round(self.rps, 1),
            "p50_us": self.p50_us,
            "p99_us": self.p99_us,
            "cpu_us_per_request": {
                name: round(value, 3) for name, value in asdict(self.cpu).items()
            },
            "cpu_gain": None if self.gain is None else round(self.gain, 3),
            "cpu_gain_spread": self.gain_spread
            and [round(value, 3) for value in self.gain_spread],
            "rounds_left_out": self.left_out,
            "stack_calls_per_request": self.calls and round(self.calls.stack, 3),
            "calls_per_request": self.calls
            and {name: round(value, 3) for name, value in asdict(self.calls).items()},
            "ring_share": round(self.ring_share, 5),
            "ring_share_client_hop": round(self.client_hop_ring_share, 5),
            "ring_share_service_hop": round(self.service_hop_ring_share, 5),
            "kmap_ss": self.sockets and asdict(self.sockets),
        }


@dataclass(frozen=True)
class Bodies:
    """The correctness pass of one set-up."""

    setup: str
    bodies: int
    bytes: int
    differences: tuple[str, ...]
    # Of the bytes that Envoy carried meanwhile.
    ring_share: float


@dataclass(frozen=True)
class DemoResult:
    """Everything that ``kmap demo`` found."""

    versions: dict[str, str]
    # CPUs that the programs were pinned to; None is no pinning.
    cpus: tuple[int, ...] | None
    rounds: int
    seconds: int
    bodies: tuple[Bodies, ...]
    rows: tuple[Row, ...]
    cells: tuple[Cell, ...]
    envoy_exit: dict[str, int]
    # Why calls were not counted, if they were not.
    calls_note: str | None
    problems: tuple[str, ...]
    # Files that were written.
    files: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        return EXIT_FAILED if self.problems else EXIT_OK

    def to_json(self) -> JsonObject:
        return {
            "schema": "kmap.demo/1",
            "ok": not self.problems,
            "envoy": self.versions["envoy"],
            "versions": self.versions,
            "cpus": None if self.cpus is None else list(self.cpus),
            "rounds": self.rounds,
            "seconds_per_round": self.seconds,
            "loads": [row.to_json() for row in self.rows],
            "bodies": [asdict(each) for each in self.bodies],
            "envoy_exit": self.envoy_exit,
            "calls_note": self.calls_note,
            "problems": list(self.problems),
            "cells": [asdict(cell) for cell in self.cells],
            "files": list(self.files),
        }


def _share(ring: int, total: int) -> float:
    # The two are counted by different programs at slightly different instants.
    return min(1.0, ring / total) if total else 0.0


def _gains(cells: Sequence[Cell], kernel: Sequence[Cell]) -> tuple[list[float], int]:
    """Kernel's CPU per request over this set-up's, by round, and rounds left out."""
    pairs = [
        (base, cell)
        for base in kernel
        for cell in cells
        if base.round == cell.round and base.cpu.total and cell.cpu.total
    ]
    quiet = [
        (base, cell)
        for base, cell in pairs
        if max(base.steal, cell.steal) <= MAXIMUM_STEAL
    ]
    # Noisy rounds are better than none.
    used = quiet or pairs
    return (
        [base.cpu.total / cell.cpu.total for base, cell in used],
        len(pairs) - len(used),
    )


def summarize(
    cells: Sequence[Cell], kernel: Sequence[Cell], calls: CallsPerRequest | None
) -> Row:
    """The row of cells, which are all of one load and set-up."""
    client_ring = sum(cell.client_hop_ring_bytes for cell in cells)
    client_all = sum(cell.client_hop_bytes for cell in cells)
    service_ring = sum(cell.service_hop_ring_bytes for cell in cells)
    service_all = sum(cell.service_hop_bytes for cell in cells)
    gains, left_out = _gains(cells, kernel)
    return Row(
        name=cells[0].load,
        setup=cells[0].setup,
        duration_s=sum(cell.duration_s for cell in cells),
        requests=sum(cell.requests for cell in cells),
        errors=sum(cell.errors for cell in cells),
        rps=statistics.median(cell.rps for cell in cells),
        p50_us=statistics.median(cell.p50_us for cell in cells),
        p99_us=statistics.median(cell.p99_us for cell in cells),
        cpu=CpuPerRequest(
            client=statistics.median(cell.cpu.client for cell in cells),
            envoy=statistics.median(cell.cpu.envoy for cell in cells),
            service=statistics.median(cell.cpu.service for cell in cells),
            total=statistics.median(cell.cpu.total for cell in cells),
        ),
        gain=statistics.median(gains) if gains else None,
        gain_spread=(min(gains), max(gains)) if gains else None,
        left_out=left_out,
        calls=calls,
        ring_share=_share(client_ring + service_ring, client_all + service_all),
        client_hop_ring_share=_share(client_ring, client_all),
        service_hop_ring_share=_share(service_ring, service_all),
        sockets=cells[-1].sockets,
    )


def problems(
    rows: Sequence[Row], bodies: Sequence[Bodies], envoy_exit: dict[str, int]
) -> tuple[str, ...]:
    """What must not be so, one sentence each."""
    found: list[str] = []
    for each in bodies:
        found.extend(
            f"bodies, {each.setup}: {difference}" for difference in each.differences
        )
        if not each.bodies:
            found.append(f"bodies, {each.setup}: none was compared")
        if each.setup == "kmap" and each.ring_share < MINIMUM_BODIES_RING_SHARE:
            found.append(
                f"bodies, kmap: only {each.ring_share:.1%} of the bytes went by ring, "
                "so that they are equal says little"
            )
    found.extend(
        f"Envoy in set-up {setup} ended with {code} on SIGTERM, not 0"
        for setup, code in envoy_exit.items()
        if code
    )
    for row in rows:
        where = f"{row.name}, {row.setup}"
        if row.errors:
            found.append(f"{where}: {row.errors} requests failed")
        if not row.requests:
            found.append(f"{where}: no request was answered")
        if row.setup != "kmap" or row.duration_s < JUDGED_FROM_S:
            continue
        for hop, share in (
            ("client to Envoy", row.client_hop_ring_share),
            ("Envoy to service", row.service_hop_ring_share),
        ):
            if share < MINIMUM_RING_SHARE:
                found.append(
                    f"{where}: only {share:.2%} of the bytes from {hop} went by ring, "
                    f"less than {MINIMUM_RING_SHARE:.0%}"
                )
        if row.sockets is not None and not row.sockets.ring:
            found.append(f"{where}: kmap ss listed no connection as ring")
        if row.gain is not None and row.gain <= 1:
            found.append(
                f"{where}: CPU per request is {1 / row.gain:.2f} times kernel TCP's, "
                "not less"
            )
    return tuple(found)


def _time(us: float) -> str:
    return f"{us:.0f} us" if us < 10_000 else f"{us / 1000:.1f} ms"


_HEADINGS = (
    "load",
    "set-up",
    "requests/s",
    "p50",
    "p99",
    "client",
    "Envoy",
    "service",
    "all three",
    "kernel / this",
    "stack calls",
    "by ring",
    "errors",
)


def _cells_of(row: Row) -> tuple[str, ...]:
    gain = ""
    if row.gain is not None and row.gain_spread is not None and row.setup != "kernel":
        low, high = row.gain_spread
        gain = f"{row.gain:.2f}x"
        if low != high:
            gain += f" ({low:.2f}-{high:.2f})"
    return (
        row.name,
        row.setup,
        f"{row.rps:,.0f}",
        _time(row.p50_us),
        _time(row.p99_us),
        f"{row.cpu.client:.1f}",
        f"{row.cpu.envoy:.1f}",
        f"{row.cpu.service:.1f}",
        f"{row.cpu.total:.1f}",
        gain,
        f"{row.calls.stack:.2f}" if row.calls else "-",
        f"{row.ring_share:.2%}",
        str(row.errors),
    )


def _where(result: DemoResult) -> str:
    versions = ", ".join(f"{name} {text}" for name, text in result.versions.items())
    if result.cpus is None:
        pinned = "not pinned"
    else:
        pinned = "all pinned to CPU " + ",".join(str(cpu) for cpu in result.cpus)
    return (
        f"{versions}; {pinned}; {result.rounds} rounds of {result.seconds} s, "
        "interleaved, medians"
    )


_LEGEND = (
    "client, Envoy, service, all three: CPU microseconds per request.  kernel / this: "
    "CPU of all three on kernel TCP divided by this (median of the rounds, and their "
    "range).  stack calls: system calls on sockets per request, all three programs; "
    "waits and doorbells are not among them."
)


def markdown(result: DemoResult) -> str:
    """The table as a Markdown document."""
    lines = [
        "# kmap demo",
        "",
        _where(result),
        "",
        "| " + " | ".join(_HEADINGS) + " |",
        "| --- | --- |" + " ---: |" * (len(_HEADINGS) - 2),
    ]
    lines += ["| " + " | ".join(_cells_of(row)) + " |" for row in result.rows]
    lines += ["", _LEGEND, ""]
    lines += [f"- {problem}" for problem in result.problems] or ["No problem found."]
    return "\n".join(lines) + "\n"


def svg(result: DemoResult) -> str:
    """What the command shows, as a picture."""
    console = Console(
        width=_WIDTH, record=True, file=io.StringIO(), force_terminal=True
    )
    _show(dataclasses.replace(result, files=()), console)
    return picture(console.export_svg(title="kmap demo"))


def _table(rows: Sequence[Row], headings: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        side: JustifyMethod = "left" if heading in ("load", "set-up") else "right"
        table.add_column(heading, justify=side, no_wrap=True)
    last = ""
    for row in rows:
        if last and row.name != last:
            table.add_row()
        cells = dict(zip(_HEADINGS, _cells_of(row), strict=True))
        style = _STYLES.get(row.setup, "")
        table.add_row(*(cells[heading] for heading in headings), style=style)
        last = row.name
    return table


_STYLES = {"kmap": "bold green", "unix": "", "kernel": "dim"}


# As wide as the table; a pipe has no width, and wrapping there makes it unreadable.
_WIDTH = 150


@renders(DemoResult)
def _render(result: DemoResult, console: Console) -> None:
    if not console.is_terminal:
        console = Console(width=_WIDTH, file=console.file)
    _show(result, console)


def _show(result: DemoResult, console: Console) -> None:
    for each in result.bodies:
        verdict = "all equal" if not each.differences else "DIFFERENT"
        ring = f", {each.ring_share:.1%} by ring" if each.setup == "kmap" else ""
        console.print(
            f"bodies, {each.setup}: {each.bodies} of 0 B to 8 MiB compared by SHA-256, "
            f"{verdict}{ring}",
            highlight=False,
        )
    whole = _table(result.rows, _HEADINGS)
    # A measurement is cut off at the width of the console that makes it.
    if Console(width=1000).measure(whole).maximum <= console.width:
        console.print(whole)
    else:
        # Half a table can be read and half of every word cannot.
        cpu = ("client", "Envoy", "service", "all three", "kernel / this")
        rest = tuple(each for each in _HEADINGS if each not in cpu)
        console.print(_table(result.rows, rest))
        console.print()
        console.print(_table(result.rows, ("load", "set-up", *cpu)))
    console.print(_LEGEND, style="dim", highlight=False)
    console.print(_where(result), style="dim", highlight=False)
    if result.calls_note:
        console.print(f"Stack calls: {result.calls_note}", highlight=False)
    for file in result.files:
        console.print(f"wrote {file}", highlight=False)
    for problem in result.problems:
        console.print(f"PROBLEM: {problem}", style="red", highlight=False)
