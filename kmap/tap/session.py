# SPDX-License-Identifier: Apache-2.0
"""The capture as a whole: finds connections, looks at each in turn, until the end."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kmap.tap.connection import Connection
from kmap.tap.flow import Sink
from kmap.tap.scout import Scout
from kmap.tap.table import End, Tables

# How often it is asked who has come and gone.
_PROCESSES_S = 0.01
# How often new connections of known processes are looked for.
_ROWS_S = 0.002
# After so long without a byte, looks are fewer.
_QUIET_S = 0.2
_QUIET_FACTOR = 5
# Connections that have ended, of which the other end may come to light later.
_OVER_MOST = 65536

_PR_SET_TIMERSLACK = 29


@dataclass(frozen=True)
class Filter:
    """What a connection has to have, at either end; None: anything."""

    pid: int | None = None
    port: int | None = None
    comm: str | None = None


@dataclass
class Session:
    """Taps what the filter lets through."""

    sink: Sink
    wanted: Filter
    # Seconds between two looks while nothing much happens; 0: none.
    interval: float
    # Says something to whoever watches.
    tell: Callable[[str], None]
    scout: Scout = field(default_factory=Scout)
    tables: Tables = field(default_factory=Tables)
    # Processes whose memory may not be read, once each.
    denied: set[str] = field(default_factory=set)
    _connections: dict[bytes, Connection] = field(default_factory=dict)
    # Those that the filter does not let through, as far as is known.
    _others: dict[bytes, Connection] = field(default_factory=dict)
    _over: dict[bytes, None] = field(default_factory=dict)
    _first: bool = True

    def begin(self) -> None:
        """The first look, after which what happens belongs to the capture."""
        # Otherwise every short sleep takes 50 us longer.
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
        for found in self.scout.wait():
            self.tables.add(found.pid, found.file)
        self._find_ends()
        self._look()
        self._first = False

    def run(self, done: Callable[[], bool]) -> None:
        """Goes on until done says so."""
        processes = rows = news = time.monotonic()
        written = -1
        while not done():
            now = time.monotonic()
            if now - processes >= _PROCESSES_S:
                processes = now
                self._find_processes()
            if now - rows >= _ROWS_S:
                rows = now
                self._find_ends()
            busy = self._look()
            # What is found in one look may be confirmed and written in a later one.
            if self.sink.totals.packets != written:
                written = self.sink.totals.packets
                self.sink.writer.flush()
            if busy:
                news = now
                os.sched_yield()
            elif self.interval:
                quiet = now - news > _QUIET_S
                time.sleep(self.interval * (_QUIET_FACTOR if quiet else 1))

    def end(self) -> None:
        """Takes what is still there, and closes."""
        self._find_processes()
        self._find_ends()
        self._look()
        for connection in self._connections.values():
            connection.close(self.sink, over=False)
        self._connections.clear()

    def close(self) -> None:
        """Ends what it started."""
        self.scout.close()

    def _find_processes(self) -> None:
        for found in self.scout.found():
            self.tables.add(found.pid, found.file)
        for text in self.tables.complaints():
            self.tell(text)
        self.tables.forget()
        for token, connection in list(self._others.items()):
            if not connection.open:
                del self._others[token]

    def _find_ends(self) -> None:
        for table in self.tables.known.values():
            for end in table.new_ends(past=not self._first):
                self._add(end)

    def _add(self, end: End) -> None:
        token = end.row.token
        if token in self._over:
            return
        connection = self._connections.get(token) or self._others.pop(token, None)
        if connection is not None:
            connection.add(end)
        else:
            try:
                connection = Connection(end, from_now=self._first)
            except ValueError:
                size = end.row.ring_size
                self.tell(f"{end}: a ring of {size} bytes is not understood")
                return
        wanted = self.wanted
        if connection.matches(wanted.pid, wanted.port, wanted.comm):
            self._connections[token] = connection
        else:
            self._others[token] = connection

    def _look(self) -> bool:
        """One look at every connection.  Whether there was something."""
        busy = False
        over = []
        for token, connection in self._connections.items():
            goes_on = connection.poll(self.sink)
            busy |= connection.busy
            if connection.denied:
                self._deny(connection)
            if not goes_on:
                over.append(token)
        for token in over:
            self._connections.pop(token).close(self.sink, over=True)
            # Its other end may be found only now.
            self._over[token] = None
            if len(self._over) > _OVER_MOST:
                del self._over[next(iter(self._over))]
        return busy or bool(over)

    def _deny(self, connection: Connection) -> None:
        for end in connection.ends.values():
            name = str(end)
            if name not in self.denied:
                self.denied.add(name)
                self.tell(
                    f"{name}: the kernel does not let you read its memory; run as root "
                    "(kernel.yama.ptrace_scope may keep it from its owner)"
                )
