# SPDX-License-Identifier: Apache-2.0
"""One connection's packets: what TCP would have sent, made up around its bytes.

The three packets of the beginning and the acknowledgement numbers are made up, and say
so in a comment; no payload ever is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kmap.tap import packets
from kmap.tap.packets import ACK, FIN, PAYLOAD_MOST, PSH, RST, SYN
from kmap.tap.pcapng import Writer
from kmap.wire import Endpoint

MADE_UP = "kmap: made up, so that the stream is followed"


@dataclass
class Totals:
    """What was written so far."""

    packets: int = 0
    # Payload, before it is cut off by snaplen.
    bytes: int = 0
    gaps: int = 0
    lost_bytes: int = 0
    connections: int = 0


@dataclass
class Sink:
    """Where packets go."""

    writer: Writer
    # Bytes of each packet that are kept; 0: all.
    snaplen: int = 0
    totals: Totals = field(default_factory=Totals)

    def put(self, ns: int, packet: bytes, comments: tuple[str, ...]) -> None:
        kept = packet[: self.snaplen] if self.snaplen else packet
        self.writer.packet(ns, kept, len(packet), comments)
        self.totals.packets += 1


@dataclass
class _Side:
    """What one end sends."""

    source: Endpoint
    target: Endpoint
    # Bytes of the stream before the ring's first; None: not known yet.
    cut: int | None = None
    # Position in the ring of the next byte.
    position: int = 0
    # Something to say with its next packet.
    note: str = ""
    # The kernel carries the rest.
    left: bool = False
    ended: bool = False

    @property
    def sequence(self) -> int:
        return 1 + (self.cut or 0) + self.position


class Flow:
    """Writes one connection; side 0 is the connector, ring 0 what it sends."""

    def __init__(
        self, sink: Sink, connector: Endpoint, acceptor: Endpoint, notes: list[str]
    ) -> None:
        self._sink = sink
        self._sides = (_Side(connector, acceptor), _Side(acceptor, connector))
        self._notes = notes
        self._opened = False

    def position(self, ring: int) -> int:
        """Of the next byte that is expected."""
        return self._sides[ring].position

    def starts(self, ring: int, position: int) -> None:
        """The capture begins there, in the middle of the connection."""
        self._sides[ring].position = position

    def cut(self, ring: int, kernel_bytes: int | None) -> None:
        """So many bytes of the stream went by the kernel before the ring."""
        side = self._sides[ring]
        if side.cut is None:
            side.cut = kernel_bytes

    def open(self, ns: int) -> None:
        """The beginning, once."""
        if self._opened:
            return
        self._opened = True
        self._sink.totals.connections += 1
        connector, acceptor = self._sides
        notes = list(self._notes)
        for side, name in ((connector, "connector"), (acceptor, "acceptor")):
            if side.cut:
                notes.append(
                    f"kmap: {side.cut} bytes of the {name} went by the kernel before"
                )
        self._packet(ns, 0, SYN, -1, (MADE_UP, *notes))
        self._packet(ns, 1, SYN | ACK, -1, (MADE_UP,))
        self._packet(ns, 0, ACK, 0, (MADE_UP,))

    def data(self, ns: int, ring: int, position: int, data: bytes) -> None:
        """Bytes from position on; what is missing before them is a gap."""
        self.open(ns)
        self.gap(ns, ring, position)
        side = self._sides[ring]
        for at in range(0, len(data), PAYLOAD_MOST):
            payload = data[at : at + PAYLOAD_MOST]
            self._packet(ns, ring, PSH | ACK, 0, (), payload)
            side.position += len(payload)
            self._sink.totals.bytes += len(payload)

    def gap(self, ns: int, ring: int, position: int) -> None:
        """What is missing before position is lost."""
        side = self._sides[ring]
        missing = position - side.position
        if missing <= 0 or side.ended:
            return
        self.open(ns)
        side.position = position
        side.note = f"kmap: {missing} bytes before this are lost"
        self._sink.totals.gaps += 1
        self._sink.totals.lost_bytes += missing

    def by_kernel(self, ns: int, ring: int) -> None:
        """This direction goes on by the kernel."""
        side = self._sides[ring]
        if self._opened and not side.left:
            side.left = True
            text = "kmap: from here on these bytes go by the kernel, where tcpdump is"
            self._packet(ns, ring, ACK, 0, (text,))

    def end(self, ns: int, ring: int) -> None:
        """The program shut it down, or closed it."""
        if self._opened and not self._sides[ring].ended:
            self._sides[ring].ended = True
            self._packet(ns, ring, FIN | ACK, 0, ())
            # A FIN has a sequence number of its own.
            self._sides[ring].position += 1

    def over(self, ns: int, *, known: bool) -> None:
        """The connection is gone; known: it was not closed in an orderly way."""
        for ring, side in enumerate(self._sides):
            if not self._opened or side.ended or side.left:
                continue
            if known:
                text = "kmap: it ended without a close"
                self._packet(ns, ring, RST | ACK, 0, (text,))
                return
            text = "kmap: it ended; whether in an orderly way was not seen"
            side.ended = True
            self._packet(ns, ring, FIN | ACK, 0, (text,))
            side.position += 1

    def _packet(
        self,
        ns: int,
        ring: int,
        flags: int,
        back: int,
        comments: tuple[str, ...],
        payload: bytes = b"",
    ) -> None:
        side, other = self._sides[ring], self._sides[1 - ring]
        if side.note:
            comments = (*comments, side.note)
            side.note = ""
        packet = packets.packet(
            side.source,
            side.target,
            side.sequence + back,
            other.sequence,
            flags,
            payload,
        )
        self._sink.put(ns, packet, comments)
