# SPDX-License-Identifier: Apache-2.0
"""The statistics of processes, mapped, and whoever has them; found again and again."""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from kmap import procfs, wire
from kmap.tap.memory import (
    HEADER,
    Gone,
    Mapped,
    Memory,
    Remote,
    geometry,
    keeps_its_size,
)
from kmap.wire import Row, RowState

# Fields of the header and of a row, in 4-byte words.
_USED_ROWS = 24 // 4
_UPGRADES = wire.COUNTERS_OFFSET // 8
_STATE, _TRANSPORT, _GENERATION, _TX_LOCK = 0, 12 // 4, 92 // 4, 196 // 4
_RING_RX_BYTES, _RING_TX_BYTES = 96 // 8, 104 // 8
_KERNEL_RX_BYTES, _KERNEL_TX_BYTES = 112 // 8, 120 // 8
_HEADER_SIZE, _ROW_SIZE = 4096, 512
_SHM = 0


class NotAllowed(Exception):
    """The kernel does not let this user read that process."""


@dataclass
class Holder:
    """A process that has a table, and through it segments."""

    pid: int
    comm: str
    pidfd: int
    # /proc/PID/mem, once somebody needed it.
    mem: int | None = None

    @property
    def alive(self) -> bool:
        return not select.select([self.pidfd], [], [], 0)[0]

    def memory(self, row: Row) -> Memory:
        """The row's segment.  Raises Gone or NotAllowed."""
        try:
            size = HEADER + 2 * geometry(row.ring_size).total
        except ValueError as error:
            raise Gone from error
        with contextlib.suppress(PermissionError):
            return Mapped(self.pid, row.segment, size, row.token)
        if self.mem is None:
            try:
                self.mem = os.open(f"/proc/{self.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
            except PermissionError as error:
                raise NotAllowed from error
            except OSError as error:
                raise Gone from error
        return Remote(self.mem, row.segment, row.token)

    def close(self) -> None:
        os.close(self.pidfd)
        if self.mem is not None:
            os.close(self.mem)


class Table:
    """The statistics memfd of a process and its forked children."""

    def __init__(self, file: procfs.StatisticsFile) -> None:
        """Raises OSError, also if it is just being made, or wire.NotStatistics."""
        fd = procfs.open_file(file)
        if fd is None:
            raise FileNotFoundError(file.path)
        try:
            if not wire.is_made(fd):
                raise FileNotFoundError(file.path)
            if not keeps_its_size(fd):
                raise wire.NotStatistics("the file may shrink")
            if os.fstat(fd).st_size % _ROW_SIZE:
                raise wire.NotStatistics("the file is no whole number of rows")
            wire.read_statistics(fd)
            self._map = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(fd)
        self.holders: dict[int, Holder] = {}
        self._raw = memoryview(self._map)
        self._long = self._raw.cast("Q")
        self._word = self._raw.cast("I")
        # Rows that were given out already: generation by index.
        self._known: dict[int, int] = {}
        self._upgrades = -1

    @property
    def comm(self) -> str:
        return next((each.comm for each in self.holders.values()), "")

    def alive(self) -> bool:
        """Whether a process has it; forgets those that have ended."""
        for pid, holder in list(self.holders.items()):
            if not holder.alive:
                del self.holders[pid]
                holder.close()
        return bool(self.holders)

    def new_ends(self, *, past: bool) -> Iterator[End]:
        """Connections that have come to a ring since the last look.

        past: also those that have ended since, of each row the last.
        """
        # Most looks find that there were none; a table may have many rows.
        upgrades = self._long[_UPGRADES]
        if upgrades == self._upgrades:
            return
        self._upgrades = upgrades
        used = min(self._word[_USED_ROWS], (len(self._map) - _HEADER_SIZE) // _ROW_SIZE)
        for index in range(used):
            generation = self.word(index, _GENERATION)
            if self._known.get(index) == generation:
                continue
            state = self.word(index, _STATE)
            if state == RowState.FREE:
                self._known[index] = generation
                if not past:
                    continue
            elif state != RowState.RING:
                continue
            row = self._row(index)
            if row is None or row.generation != generation:
                self._upgrades = -1
                continue
            self._known[index] = generation
            if (
                self.word(index, _TRANSPORT) == _SHM
                and row.segment
                and (state == RowState.RING or row.ring_rx_bytes or row.ring_tx_bytes)
            ):
                yield End(self, row)

    def _row(self, index: int) -> Row | None:
        at = _HEADER_SIZE + index * _ROW_SIZE
        raw = self._map[at : at + wire.ROW.size]
        # What a free row says stays until it is used again.
        raw = RowState.RING.to_bytes(4, sys.byteorder) + raw[4:]
        try:
            return wire.decode_row(raw, 0, index)
        except wire.NotStatistics:
            return None

    def word(self, index: int, place: int) -> int:
        """A 4-byte word of a row."""
        return self._word[(_HEADER_SIZE + index * _ROW_SIZE) // 4 + place]

    def long(self, index: int, place: int) -> int:
        """An 8-byte word of a row."""
        return self._long[(_HEADER_SIZE + index * _ROW_SIZE) // 8 + place]

    def close(self) -> None:
        for holder in self.holders.values():
            holder.close()
        self._long.release()
        self._word.release()
        self._raw.release()
        self._map.close()


@dataclass
class End:
    """One end of a connection: a row, as long as it is this connection's."""

    table: Table
    row: Row

    @property
    def same(self) -> bool:
        """Whether the row is still this connection's, which may have ended."""
        generation = self.table.word(self.row.number, _GENERATION)
        return generation == self.row.generation

    @property
    def alive(self) -> bool:
        """Whether the connection is open at this end."""
        state = self.table.word(self.row.number, _STATE)
        return state != RowState.FREE and self.same and bool(self.table.holders)

    @property
    def put(self) -> int:
        """Bytes that it has put into its ring; valid if same afterwards."""
        return self.table.long(self.row.number, _RING_TX_BYTES)

    @property
    def taken(self) -> int:
        """Bytes that it has taken from the other ring; the same."""
        return self.table.long(self.row.number, _RING_RX_BYTES)

    @property
    def cut(self) -> int:
        """Bytes that it sent by the kernel before its ring; the same."""
        return self.table.long(self.row.number, _KERNEL_TX_BYTES)

    @property
    def peer_cut(self) -> int:
        """Bytes that came by the kernel before the other ring; the same."""
        return self.table.long(self.row.number, _KERNEL_RX_BYTES)

    def idle(self) -> bool:
        """Whether no thread is writing to the ring."""
        if self.table.word(self.row.number, _TX_LOCK) == 0:
            return True
        # A row that is another connection's has nobody left who writes for this one.
        return not self.same

    def memory(self) -> Memory:
        """Its segment.  Raises Gone or NotAllowed."""
        denied = False
        for holder in self.table.holders.values():
            try:
                return holder.memory(self.row)
            except Gone:
                continue
            except NotAllowed:
                denied = True
        raise NotAllowed if denied else Gone

    def __str__(self) -> str:
        pids = "/".join(str(pid) for pid in self.table.holders)
        return f"{self.table.comm}/{pids}" if pids else "a process that has ended"


@dataclass
class Tables:
    """Those of all processes that were found."""

    known: dict[tuple[int, int], Table] = field(default_factory=dict)
    # Why one is not understood; None once that has been told.
    strange: dict[tuple[int, int], str | None] = field(default_factory=dict)

    def add(self, pid: int, file: procfs.StatisticsFile) -> None:
        """The process has it."""
        if file.identity in self.strange:
            return
        table = self.known.get(file.identity)
        try:
            if table is None:
                table = self.known[file.identity] = Table(file)
            if pid not in table.holders:
                holder = Holder(pid, procfs.comm(pid), os.pidfd_open(pid))
                table.holders[pid] = holder
        except OSError:
            # It ended meanwhile.
            return
        except wire.NotStatistics as error:
            self.strange[file.identity] = f"{file.path}: {error}"

    def complaints(self) -> list[str]:
        """About each that is not understood, once."""
        found = [text for text in self.strange.values() if text is not None]
        self.strange.update(dict.fromkeys(self.strange))
        return found

    def forget(self) -> None:
        """Those that no process has any more; connections keep what they need."""
        for identity, table in list(self.known.items()):
            if not table.alive():
                del self.known[identity]
