# SPDX-License-Identifier: Apache-2.0
"""What a recording and the shares of CPU say, as tables in Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from kmap.demo.syscalls import Calls
from kmap.trace import share
from kmap.trace.recording import (
    ANSWERED,
    RING,
    SETUPS,
    STACK,
    WAIT,
    WAKE_UP,
    Recording,
    Side,
)
from kmap.trace.share import Shares

TITLES = {"kernel": "without Kmap", "kmap": "with Kmap"}
KINDS = tuple(each.name for each in dataclasses.fields(Calls))


def ranges(side: Side) -> str:
    """How many calls the recorded requests made, from the fewest to the most."""
    pairs = zip(
        KINDS,
        dataclasses.astuple(side.spread.least),
        dataclasses.astuple(side.spread.most),
        strict=True,
    )
    return ", ".join(
        f"{name} {low}" + ("" if low == high else f"-{high}")
        for name, low, high in pairs
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join(lines)


def _rows(side: Side) -> Iterable[list[object]]:
    for role in side.roles:
        own = side.of(role, RING, ANSWERED)
        strace = "" if side.strace is None else side.strace.calls[role].stack
        yield [
            *(TITLES[side.setup], role),
            *dataclasses.astuple(side.count(role)),
            *(len(own), strace),
        ]
    yield [
        *(f"**{TITLES[side.setup]}**", "**all**"),
        *(f"**{count}**" for count in dataclasses.astuple(side.count_all())),
        len([call for call in side.calls if call.kind in (RING, ANSWERED)]),
        "" if side.strace is None else sum(c.stack for c in side.strace.calls.values()),
    ]


def counts(found: Recording) -> str:
    """Calls by program and kind, and how sure they are."""
    head = ("set-up", "program", *KINDS, "by the library alone", "stack, under strace")
    parts = [_table(head, (row for side in found.sides for row in _rows(side)))]
    for side in found.sides:
        text = (
            f"{side.spread.alike} of {side.spread.requests} requests "
            f"{TITLES[side.setup]} made these calls; all of them: {ranges(side)}."
        )
        if side.strace is not None:
            text += (
                f" Of {side.strace.requests} requests that strace saw too, both "
                f"counted the same in {side.strace.agree}."
            )
        if side.ring_bytes:
            hops = (f"{hop} {count}" for hop, count in side.ring_bytes.items())
            text += f" Bytes by ring, as the library counts them: {', '.join(hops)}."
        parts.append(text)
    return "\n\n".join(parts) + "\n"


def calls(found: Recording) -> str:
    """The calls themselves, in order, by program."""
    rows = []
    for side in found.sides:
        for role in side.roles:
            rows.append(
                [TITLES[side.setup], role]
                + [
                    ", ".join(call.name for call in side.of(role, *kinds)) or "none"
                    for kinds in ((STACK,), (WAIT, WAKE_UP), (RING, ANSWERED))
                ]
            )
    head = ("set-up", "program", "network stack", "waits and wake-ups", "by ring")
    return _table(head, rows) + "\n"


def shares(found: Shares) -> str:
    """CPU per request by group."""
    bars = [found.bar(p, s) for p in share.PROGRAMS for s in SETUPS]
    head = [
        "us of CPU per request",
        *(f"{share.PROGRAMS[bar.program]} {TITLES[bar.setup]}" for bar in bars),
    ]
    rows: list[list[object]] = [
        [title, *(f"{bar.groups[name]:.2f}" for bar in bars)]
        for name, (title, _) in reversed(share.GROUPS.items())
    ]
    rows.append(["**all**", *(f"**{bar.total:.2f}**" for bar in bars)])
    extremes = [(min(bar.rounds), max(bar.rounds)) for bar in bars]
    rows.append(["all, by round", *(f"{low:.1f}-{high:.1f}" for low, high in extremes)])
    rows.append(["samples", *(bar.samples for bar in bars)])
    return _table(head, rows) + "\n"
