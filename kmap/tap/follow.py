# SPDX-License-Identifier: Apache-2.0
"""Follows one direction of a connection through its ring, from outside.

The reader is not waited for, so the producer may overwrite bytes before they were
copied, or while they are.  What could have happened to a copy is known only after it:

- Bytes that the consumer has not taken after the copy were not overwritten before.
- Of the others, whoever may be writing has to be seen to have finished, or somebody
  seen to be writing nothing (the producer's lock).  Once it has, its position says
  which bytes it may have overwritten.

Until then a copy is unconfirmed.  Bytes that were or may have been overwritten are
lost, and counted; docs/protocol.md, section 10, has the rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kmap.tap.memory import HEADER, Geometry, Header, Memory

CUT, END, FIN, CLOSED = 1, 2, 4, 8
# After these nothing more is put into a ring.
LAST = END | FIN | CLOSED

# Fields of a ring, in words of the size that they have, from the ring's start.
_RING_BYTES = 384
_FIRST_RING = 128
_WPOS, _GROW_AT, _CUT, _TORN, _RPOS = 0, 1, 4, 7, 16
_PFLAGS = 12


@dataclass(frozen=True)
class Positions:
    """What a ring's header says, each field loaded once, in this order."""

    flags: int
    written: int
    torn: int
    taken: int
    # Where each level but the last ends; None: it has not.
    ends: tuple[int | None, ...]


@dataclass
class Piece:
    """Bytes of the stream, in one copy."""

    ring: int
    start: int
    data: bytes
    # When they were first seen, in nanoseconds since the epoch.
    ns: int
    # wpos when the copy was finished.
    written: int
    confirmed: bool = False

    @property
    def end(self) -> int:
        return self.start + len(self.data)


@dataclass
class Direction:
    """One ring."""

    ring: int
    levels: Geometry
    # Position of the next byte to copy.
    next: int = 0
    # Whether nobody is writing now; None where that is not to be seen.
    idle: Callable[[], bool | None] = lambda: None
    unconfirmed: list[Piece] = field(default_factory=list)

    def positions(self, header: Header) -> Positions:
        """A look at the header."""
        long = (_FIRST_RING + self.ring * _RING_BYTES) // 8
        flags = header.word[2 * long + _PFLAGS]
        written = header.long[long + _WPOS]
        torn = header.long[long + _TORN]
        taken = header.long[long + _RPOS]
        ends: list[int | None] = []
        for level in range(len(self.levels.sizes) - 1):
            grown = header.long[long + _GROW_AT + level]
            ends.append(grown - 1 if grown else None)
        return Positions(flags, written, torn, taken, tuple(ends))

    def cut(self, header: Header) -> int | None:
        """Bytes that went by the kernel before the ring; None: not known yet."""
        long = (_FIRST_RING + self.ring * _RING_BYTES) // 8
        if not header.word[2 * long + _PFLAGS] & CUT:
            return None
        return header.long[long + _CUT]

    def poll(self, memory: Memory, ns: int) -> Piece | None:
        """Copies what is new at time ns.  None: nothing is."""
        now = self.positions(memory.header())
        if not self._sane(now):
            return None
        start = max(self.next, self._still_there(now, now.written))
        parts = []
        at = start
        while at < now.written:
            level, level_end = self._level(now, at)
            size = self.levels.sizes[level]
            offset = at & (size - 1)
            length = min(min(level_end, now.written) - at, size - offset)
            parts.append(
                memory.read(
                    HEADER
                    + self.ring * self.levels.total
                    + self.levels.offsets[level]
                    + offset,
                    length,
                )
            )
            at += length
        later = self.positions(memory.header())
        # The copy of a header is not one load: did its parts fit together?
        if later.written < now.written or any(
            then is None and end is not None and end < now.written
            for then, end in zip(now.ends, later.ends, strict=True)
        ):
            return None
        piece = Piece(self.ring, start, b"".join(parts), ns, later.written)
        self.next = now.written
        self.unconfirmed.append(piece)
        return piece

    def confirm(self, memory: Memory) -> None:
        """Confirms copies as far as that can be done now, and cuts off what is lost."""
        before = self.positions(memory.header())
        idle = self.idle()
        after = self.positions(memory.header())
        floor = self._still_there(after, max(after.written, after.torn))
        left = []
        for piece in self.unconfirmed:
            finished = idle or before.flags & LAST or before.written > piece.written
            if finished:
                _cut_off(piece, min(floor, max(after.taken, piece.start)))
            elif after.taken > piece.start:
                left.append(piece)
                continue
            piece.confirmed = True
        self.unconfirmed = left

    def give_up(self) -> None:
        """Nothing more can be found out: what is unconfirmed is lost."""
        for piece in self.unconfirmed:
            _cut_off(piece, piece.end)
            piece.confirmed = True
        self.unconfirmed.clear()

    def _sane(self, now: Positions) -> bool:
        """A producer that breaks the protocol is nothing to follow."""
        return (
            now.written > self.next
            and now.written - now.taken <= self.levels.sizes[-1]
            and list(filter(None, now.ends)) == sorted(filter(None, now.ends))
        )

    def _level(self, now: Positions, at: int) -> tuple[int, int]:
        """The level that position at is in, and where it ends if it does."""
        for level, end in enumerate(now.ends):
            if end is None:
                return level, now.written
            if at < end:
                return level, end
        return len(self.levels.sizes) - 1, now.written

    def _still_there(self, now: Positions, written: int) -> int:
        """The first position that is not overwritten with all before written there."""
        floor = 0
        for level, size in enumerate(self.levels.sizes):
            end = now.ends[level] if level < len(now.ends) else None
            if end is None:
                return max(floor, written - size)
            # The level is not written to any more; what is torn may be in it.
            floor = max(floor, min(end, max(end, now.torn) - size))
        return floor


def _cut_off(piece: Piece, start: int) -> None:
    """Leaves what is not before start."""
    if start > piece.start:
        start = min(start, piece.end)
        piece.data = piece.data[start - piece.start :]
        piece.start = start
