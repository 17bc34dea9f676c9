# SPDX-License-Identifier: Apache-2.0
"""The crash matrix: where each point of faults.def is met, and what follows a death.

docs/protocol.md has the same rows in words; test_matrix.py holds the two together.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.faults.drive import SHAPES, SIDES

ROOT = Path(__file__).resolve().parents[2]

# What a survivor may meet when its peer dies.
EOF = frozenset({"eof"})
RESET = frozenset({"ECONNRESET"})
# It depends on whether the dead had left something unread.
EITHER = EOF | RESET
GOES_ON = frozenset({""})

TO_SURVIVOR = frozenset({"victim"})
TO_VICTIM = frozenset({"survivor"})
EVENTS = tuple(shape for shape in SHAPES if shape != "recv")


@dataclass(frozen=True)
class Row:
    """One point on one side or both."""

    point: str
    end: frozenset[str]
    # The steps of tests/faults/programs/end.py at which a death on the kernel has to
    # look the same.
    kernel: tuple[str, ...]
    sides: tuple[str, ...] = SIDES
    scenario: str = "talk"
    # Whether it is the one that the scenario is about that dies.
    actor: bool = True
    count: int = 1
    # How the survivor waits, and how the victim does.
    shapes: tuple[str, ...] = SHAPES
    victim_shape: str = "recv"
    # Who sends only to a sleeper.
    patient: frozenset[str] = frozenset()
    # Whether the bytes of the call in which it dies arrive; None: some of them may.
    delivered: bool | None = None
    # Whether transports that are made of pipes pass it.
    in_pipes: bool = True


def _link(point: str, side: str) -> Row:
    steps = ("send.before:2", "recv.before:2")
    return Row(point, EITHER, steps, sides=(side,))


ROWS = (
    *(_link(f"offer.{name}", "connector") for name in ("bound", "listens", "made")),
    *(
        _link(f"hello.{name}", "acceptor")
        for name in ("knock", "inside", "segment", "bell", "sent")
    ),
    *(
        _link(f"attach.{name}", "connector")
        for name in ("came", "taken", "mapped", "bell", "acked", "done")
    ),
    *(_link(f"attach.{name}", "acceptor") for name in ("answer", "ready")),
    Row("cut.counted", EOF, ("send.before:5",), delivered=False),
    Row("cut.made", EOF, ("send.before:5",), delivered=False),
    Row("cut.seen", RESET, ("late.before:1",), scenario="behind", actor=False),
    Row("cut.drained", RESET, ("late.before:1",), scenario="behind", actor=False),
    Row("write.copy", EOF, ("send.before:9",), count=3, delivered=False),
    Row("write.copied", EOF, ("send.before:9",), count=3, delivered=False),
    Row(
        "write.published",
        EITHER,
        ("send.after:9",),
        count=3,
        patient=TO_SURVIVOR,
        delivered=True,
    ),
    Row("write.full", EOF, ("send.before:11",), scenario="flood"),
    Row(
        "write.file",
        EOF,
        ("send.before:11",),
        scenario="file",
        count=2,
        in_pipes=False,
    ),
    Row("read.copy", RESET, ("recv.late:9",), count=3),
    Row("read.copied", RESET, ("recv.late:9",), count=3),
    Row("read.released", EOF, ("recv.after:9",), count=3),
    Row("read.asks", EOF, ("answer.before:1",), scenario="half", actor=False),
    Row(
        "wake.consumer",
        EITHER,
        ("send.after:9",),
        count=3,
        patient=TO_SURVIVOR,
        delivered=True,
    ),
    Row(
        "wake.futex",
        EITHER,
        ("send.after:9",),
        shapes=("recv",),
        patient=TO_SURVIVOR,
        delivered=True,
    ),
    Row("wake.producer", RESET, ("recv.before:11",), scenario="flood", actor=False),
    Row(
        "wake.bell",
        EITHER,
        ("send.after:9",),
        shapes=EVENTS,
        patient=TO_SURVIVOR,
        delivered=True,
    ),
    Row(
        "wake.rung",
        EITHER,
        ("send.after:9",),
        shapes=EVENTS,
        patient=TO_SURVIVOR,
        delivered=True,
    ),
    Row("wake.nap", EITHER, ("recv.before:9",), count=2, patient=TO_VICTIM),
    Row(
        "wake.armed",
        EITHER,
        ("recv.before:9",),
        count=3,
        victim_shape="epoll",
        patient=TO_VICTIM,
    ),
    Row(
        "wake.drain",
        EITHER,
        ("recv.before:9",),
        count=3,
        victim_shape="epoll",
        patient=TO_VICTIM,
    ),
    Row("grow.begin", EOF, ("send.before:9",), scenario="flood", in_pipes=False),
    Row("grow.stored", EOF, ("send.before:9",), scenario="flood", in_pipes=False),
    Row(
        "grow.follow",
        RESET,
        ("recv.before:10",),
        scenario="flood",
        actor=False,
        in_pipes=False,
    ),
    Row("close.begin", EOF, ("close.before:1",), delivered=True),
    Row("close.flags", EOF, ("close.before:1",), delivered=True),
    Row("close.kernel", EOF, ("close.after:1",), delivered=True),
    Row("close.freed", EOF, ("close.after:1",), delivered=True),
    Row("close.done", EOF, ("close.after:1",), delivered=True),
    Row("close.half", EOF, ("shutdown.before:1",), scenario="half", delivered=True),
    Row("close.end", EOF, ("answer.before:1",), scenario="half", actor=False),
    Row("close.taken", EOF, ("close.before:1",), scenario="taken", delivered=True),
    Row("close.leave", RESET, ("option.before:1",), scenario="leave"),
    # Who left the ring may have been told of it as a program is: what it left is sent
    # again first.
    Row("close.left", EITHER | {"EPIPE"}, ("option.after:1",), scenario="leave"),
    Row(
        "close.resend",
        # The survivor may be sending when it finds out.
        EITHER | {"EPIPE"},
        ("handed.after:1",),
        scenario="leave",
        actor=False,
        delivered=True,
    ),
    Row("fork.prepare", EITHER, ("fork.before:1",), scenario="family", delivered=True),
    Row("fork.parent", GOES_ON, (), scenario="family", delivered=True),
    Row("fork.child", GOES_ON, (), scenario="family", delivered=True),
)


def points() -> dict[str, str]:
    """Every point of faults.def and where it is."""
    text = (ROOT / "core" / "base" / "faults.def").read_text()
    return dict(re.findall(r'^X\(\w+, "([^"]+)",\s+"([^"]+)"\)', text, re.MULTILINE))
