# SPDX-License-Identifier: Apache-2.0
"""One connection while it is tapped: its ends, its two rings, and its packets."""

from __future__ import annotations

import time
from collections import deque

from kmap.tap.flow import Flow, Sink
from kmap.tap.follow import CLOSED, END, FIN, Direction, Piece
from kmap.tap.memory import Gone, Memory, geometry
from kmap.tap.table import End, NotAllowed
from kmap.wire import Endpoint, Role

# How often flags that come without bytes are looked for.
_FLAGS_NS = 10_000_000
# When memory that may not be read is tried again.
_AGAIN_NS = 1_000_000_000
# A piece that waits so long to be confirmed holds up others, and memory.
_QUEUE_MOST = 64 << 20


class Connection:
    """Follows both rings of a connection; made from the first end that is found."""

    def __init__(self, end: End, *, from_now: bool) -> None:
        """from_now: what it carried before does not belong to the capture."""
        self.ends: dict[int, End] = {}
        self.denied = False
        # Something was seen at the last look.
        self.busy = False
        self._from_now = from_now
        self._memory: Memory | None = None
        self._flow: Flow | None = None
        self._queue: deque[Piece] = deque()
        self._looked = 0
        self._again = 0
        self._flags = [0, 0]
        levels = geometry(end.row.ring_size)
        self._rings = (
            Direction(0, levels, idle=lambda: self._idle(0)),
            Direction(1, levels, idle=lambda: self._idle(1)),
        )
        self.add(end)

    def add(self, end: End) -> None:
        """Its other end, or the same in another process."""
        self.ends.setdefault(0 if end.row.role == Role.CONNECTOR else 1, end)

    def _idle(self, ring: int) -> bool | None:
        end = self.ends.get(ring)
        return end.idle() if end is not None else None

    @property
    def open(self) -> bool:
        """Whether an end is."""
        return any(end.alive for end in self.ends.values())

    def matches(self, pid: int | None, port: int | None, comm: str | None) -> bool:
        """Whether it has all that is asked for, at either end."""
        ends = self.ends.values()
        if pid is not None and not any(pid in end.table.holders for end in ends):
            return False
        if port is not None and not any(
            port
            in (
                end.row.local.port,
                end.row.peer.port,
                end.row.original_dst.port if end.row.original_dst else port - 1,
            )
            for end in ends
        ):
            return False
        return comm is None or any(
            holder.comm == comm for end in ends for holder in end.table.holders.values()
        )

    def _start(self, sink: Sink) -> bool:
        """Gets at the memory.  False: not now."""
        for end in self.ends.values():
            try:
                self._memory = end.memory()
                break
            except Gone:
                continue
            except NotAllowed:
                self.denied = True
                self._again = time.monotonic_ns() + _AGAIN_NS
        else:
            return False
        self.denied = False
        if self._flow is None:
            self._flow = Flow(sink, *self._addresses(), self._notes())
            if self._from_now:
                header = self._memory.header()
                for ring in self._rings:
                    ring.next = ring.positions(header).written
                    self._flow.starts(ring.ring, ring.next)
        return True

    def _addresses(self) -> tuple[Endpoint, Endpoint]:
        """As the connector sees them: those are the ones on the wire."""
        if (connector := self.ends.get(0)) is not None:
            return connector.row.local, connector.row.peer
        row = self.ends[1].row
        return row.peer, row.original_dst or row.local

    def _notes(self) -> list[str]:
        notes = [
            f"kmap: {name}: {self.ends[side]}"
            for side, name in enumerate(("connector", "acceptor"))
            if side in self.ends
        ]
        acceptor = self.ends.get(1)
        if acceptor is not None and acceptor.row.original_dst is not None:
            notes.append(
                f"kmap: redirected from {acceptor.row.original_dst} "
                f"to {acceptor.row.local}"
            )
        return notes

    def poll(self, sink: Sink) -> bool:
        """Copies and writes what is new.  False: the connection is over."""
        self.busy = False
        over = not self.open
        now = time.monotonic_ns()
        if not over and now - self._looked < _FLAGS_NS and not self._news():
            return True
        self._looked = now
        try:
            if self._memory is None and not (now >= self._again and self._start(sink)):
                return not over
            self._look()
        except Gone:
            self._lose_memory()
        if over:
            self._finish()
        self._write()
        return not over

    def _news(self) -> bool:
        """A cheap look: whether an end has put something into its ring."""
        if self._queue or len(self.ends) < 2:
            return True
        return any(self.ends[ring.ring].put > ring.next for ring in self._rings)

    def _look(self) -> None:
        assert self._memory is not None
        # The answer is copied first: then the request to each is in the other copy.
        ns = time.time_ns()
        answer = self._rings[1].poll(self._memory, ns)
        request = self._rings[0].poll(self._memory, ns)
        for piece in (request, answer):
            if piece is not None:
                self.busy = True
                self._queue.append(piece)
        for ring in self._rings:
            if ring.unconfirmed:
                ring.confirm(self._memory)
        for ring in self._rings:
            # The last bytes may have come between the copy and their end.
            flags = ring.positions(self._memory.header()).flags
            header = self._memory.header()
            if ring.positions(header).written <= ring.next:
                self._flags[ring.ring] = flags
            if self._flow is not None:
                self._flow.cut(ring.ring, ring.cut(header))
        if self.busy and sum(len(piece.data) for piece in self._queue) > _QUEUE_MOST:
            self._finish()

    def _lose_memory(self) -> None:
        """One process has unmapped it; the other may still have it."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def _finish(self) -> None:
        """Nothing more comes."""
        for ring in self._rings:
            ring.give_up()

    def _write(self) -> None:
        flow = self._flow
        if flow is None:
            return
        while self._queue and self._queue[0].confirmed:
            piece = self._queue.popleft()
            if piece.data:
                flow.data(piece.ns, piece.ring, piece.start, piece.data)
        if self._queue:
            return
        ns = time.time_ns()
        for ring in self._rings:
            flags = self._flags[ring.ring]
            if flow.position(ring.ring) < ring.next:
                continue
            if flags & END:
                flow.by_kernel(ns, ring.ring)
            if flags & (FIN | CLOSED):
                flow.end(ns, ring.ring)

    def close(self, sink: Sink, *, over: bool) -> None:
        """Writes how it ended, or that it goes on after the capture."""
        self._finish()
        self._write()
        ns = time.time_ns()
        if self._flow is None and not self.denied and not self._from_now:
            # It was over before anybody could look.
            self._flow = Flow(sink, *self._addresses(), self._notes())
        if self._flow is not None and over:
            self._count_rest(self._flow, ns)
            lasting = self._memory is not None and self._memory.lasting
            self._flow.over(ns, known=lasting)
        self._lose_memory()

    def _count_rest(self, flow: Flow, ns: int) -> None:
        """What was put into the rings and is not in the capture, as the rows say."""
        for ring, end in self.ends.items():
            sides = ((ring, end.put, end.cut), (1 - ring, end.taken, end.peer_cut))
            if not end.same:
                continue
            for side, position, cut in sides:
                if side == ring or side not in self.ends:
                    flow.cut(side, cut)
                    flow.gap(ns, side, position)
