# SPDX-License-Identifier: Apache-2.0
"""What a copy out of a ring is worth, in each case of docs/protocol.md, section 10."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from kmap.tap.follow import CUT, END, FIN, Direction
from kmap.tap.memory import HEADER, Gone, Header, geometry

_RING = 128 // 8
_SIZE = 16384


@dataclass
class FakeRing:
    """A segment whose producer does what a test says, also while it is being read."""

    lasting = True
    ring_size: int = _SIZE
    raw: bytearray = field(init=False)
    # Done at the next read of data.
    meanwhile: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self.raw = bytearray(HEADER + 2 * geometry(self.ring_size).total)
        self.long = memoryview(self.raw).cast("Q")
        self.word = memoryview(self.raw).cast("I")

    def header(self) -> Header:
        return Header(self.long, self.word)

    def read(self, offset: int, length: int) -> bytes:
        part = bytes(self.raw[offset : offset + length])
        if self.meanwhile is not None:
            happens, self.meanwhile = self.meanwhile, None
            happens()
        return part

    def close(self) -> None:
        raise Gone

    def put(self, end: int, *, publish: bool = True) -> None:
        """The producer goes on to position end, in the level it is in."""
        levels = geometry(self.ring_size)
        level = sum(1 for i in range(len(levels.sizes) - 1) if self.long[_RING + 1 + i])
        for at in range(self.long[_RING], end):
            place = at & (levels.sizes[level] - 1)
            self.raw[HEADER + levels.offsets[level] + place] = byte(at)
        if publish:
            self.long[_RING] = end

    def take(self, end: int) -> None:
        self.long[_RING + 16] = end

    def grow(self, level: int) -> None:
        self.long[_RING + 1 + level] = self.long[_RING] + 1

    def tear(self, end: int) -> None:
        self.long[_RING + 7] = end

    def flags(self, flags: int) -> None:
        self.word[2 * _RING + 12] = flags


def byte(at: int) -> int:
    """Of the stream, at a position."""
    return (at * 7 + at // 251) % 256


def stream(start: int, end: int) -> bytes:
    return bytes(map(byte, range(start, end)))


def copied(ring: FakeRing, direction: Direction) -> tuple[int, bytes] | None:
    """Copies and confirms; where what is confirmed starts, and what it is."""
    piece = direction.poll(ring, 0)
    assert piece is not None
    direction.confirm(ring)
    return (piece.start, piece.data) if piece.confirmed else None


@pytest.fixture
def ring() -> FakeRing:
    return FakeRing()


def one(*, idle: bool | None = True, ring_size: int = _SIZE) -> Direction:
    return Direction(0, geometry(ring_size), idle=lambda: idle)


def test_nothing_new_is_nothing(ring: FakeRing) -> None:
    assert one().poll(ring, 0) is None


def test_unread_bytes_are_right_whoever_writes(ring: FakeRing) -> None:
    ring.put(100)
    assert copied(ring, one(idle=None)) == (0, stream(0, 100))
    ring.take(100)
    assert copied(ring, one(idle=False)) is None


def test_taken_bytes_wait_for_an_idle_producer(ring: FakeRing) -> None:
    ring.put(100)
    ring.take(100)
    free = False
    direction = Direction(0, geometry(_SIZE), idle=lambda: free)
    piece = direction.poll(ring, 0)
    assert piece is not None
    direction.confirm(ring)
    assert not piece.confirmed
    free = True
    direction.confirm(ring)
    assert (piece.confirmed, piece.data) == (True, stream(0, 100))
    assert not direction.unconfirmed


def test_a_further_publication_confirms_what_it_spared(ring: FakeRing) -> None:
    direction = one(idle=None)
    ring.put(100)
    ring.take(100)
    piece = direction.poll(ring, 0)
    assert piece is not None
    ring.put(_SIZE + 60)
    ring.take(_SIZE + 60)
    direction.confirm(ring)
    # The sixty first bytes may have been overwritten before they were copied.
    assert (piece.confirmed, piece.start, piece.data) == (True, 60, stream(60, 100))


@pytest.mark.parametrize("flag", [END, FIN])
def test_the_end_of_a_ring_confirms(ring: FakeRing, flag: int) -> None:
    ring.put(100)
    ring.take(100)
    ring.flags(CUT | flag)
    assert copied(ring, one(idle=None)) == (0, stream(0, 100))
    ring.flags(CUT)
    assert copied(ring, one(idle=None)) is None


def test_a_write_during_the_copy_costs_what_it_overwrote(ring: FakeRing) -> None:
    ring.put(_SIZE)
    ring.take(_SIZE)
    ring.meanwhile = lambda: ring.put(_SIZE + 1000)
    start, data = copied(ring, one()) or (0, b"")
    assert (start, data) == (1000, stream(1000, _SIZE))


def test_a_write_that_is_not_published_yet_is_waited_for(ring: FakeRing) -> None:
    ring.put(_SIZE)
    ring.take(_SIZE)
    ring.put(_SIZE + 1000, publish=False)
    writing = True
    direction = Direction(0, geometry(_SIZE), idle=lambda: not writing)
    piece = direction.poll(ring, 0)
    assert piece is not None
    # What was copied is wrong, and nothing in the ring says so yet.
    assert piece.data != stream(0, _SIZE)
    direction.confirm(ring)
    assert not piece.confirmed
    ring.put(_SIZE + 1000)
    writing = False
    direction.confirm(ring)
    assert (piece.start, piece.data) == (1000, stream(1000, _SIZE))


def test_a_write_that_failed_is_known_by_its_mark(ring: FakeRing) -> None:
    ring.put(_SIZE)
    ring.take(_SIZE)
    ring.put(_SIZE + 1000, publish=False)
    ring.tear(_SIZE + 1000)
    assert copied(ring, one()) == (1000, stream(1000, _SIZE))


def test_what_was_overwritten_before_is_skipped(ring: FakeRing) -> None:
    direction = one()
    ring.put(3 * _SIZE + 5)
    ring.take(3 * _SIZE + 5)
    assert copied(ring, direction) == (
        2 * _SIZE + 5,
        stream(2 * _SIZE + 5, 3 * _SIZE + 5),
    )
    assert direction.next == 3 * _SIZE + 5


def test_levels_are_followed() -> None:
    ring = FakeRing(ring_size=1 << 18)
    direction = one(ring_size=1 << 18)
    ring.put(10_000)
    ring.grow(0)
    ring.put(60_000)
    ring.grow(1)
    ring.put(200_000)
    assert copied(ring, direction) == (0, stream(0, 200_000))
    ring.take(200_000)
    ring.put(300_000)
    ring.take(300_000)
    assert copied(ring, direction) == (200_000, stream(200_000, 300_000))
    # The first levels are not written to any more.
    late = one(ring_size=1 << 18)
    assert copied(ring, late) == (
        300_000 - (1 << 18),
        stream(300_000 - (1 << 18), 300_000),
    )


def test_a_level_that_begins_during_the_copy_is_no_trouble() -> None:
    ring = FakeRing(ring_size=1 << 16)
    direction = one(ring_size=1 << 16)
    ring.put(10_000)

    def go_on() -> None:
        ring.take(10_000)
        ring.grow(0)
        ring.put(40_000)

    ring.meanwhile = go_on
    assert copied(ring, direction) == (0, stream(0, 10_000))
    assert copied(ring, direction) == (10_000, stream(10_000, 40_000))


def test_a_producer_that_breaks_the_protocol_is_not_followed(ring: FakeRing) -> None:
    ring.long[_RING] = _SIZE + 1
    assert one().poll(ring, 0) is None
    ring.long[_RING] = 1 << 63
    assert one().poll(ring, 0) is None


def test_what_stays_unconfirmed_is_given_up(ring: FakeRing) -> None:
    ring.put(100)
    ring.take(100)
    direction = one(idle=None)
    piece = direction.poll(ring, 0)
    assert piece is not None
    direction.confirm(ring)
    direction.give_up()
    assert (piece.confirmed, piece.start, piece.data) == (True, 100, b"")
