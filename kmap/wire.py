# SPDX-License-Identifier: Apache-2.0
"""Reads the statistics memfd of a process, from its description alone.

Nothing here goes through the C library: it is the second opinion on the layout, and
it works on a process that runs another build.
"""

from __future__ import annotations

import enum
import functools
import ipaddress
import os
import struct
import sys
from dataclasses import dataclass
from typing import NamedTuple

MAGIC = int.from_bytes(b"MAPSTATS", "little")
VERSION = 1
COUNTERS_OFFSET = 256
REASONS_OFFSET = 1024
TABLE_LENGTH = 64

# magic, version, header_size, row_size, row_count, used_rows, pid, comm
HEADER = struct.Struct("=QIIIIII16s")
# state, role, reason, transport, inode, fd, pid, three ports and a pad, three
# addresses, ring_size, generation, six counts, token, segment
ROW = struct.Struct("=IIIIQiIHHHH16s16s16sIIQQQQQQ16sQ")
_TABLE = struct.Struct(f"={TABLE_LENGTH}Q")
_ATTEMPTS = 3
# Rows that are read at once, and then once more.
_BATCH = 1024
# Counters of the bytes of closed connections, in the order of counters.def.
CLOSED_BYTES = slice(10, 14)
# A bound for what is believed of another's file: section 11 of the protocol, and eight
# times the size of today's rows.
_MOST_ROWS = 1 << 16
_MOST_ROW_SIZE = 1 << 12


class NotStatistics(Exception):
    """The file is not a statistics memfd of a version that is understood here."""


class RowState(enum.IntEnum):
    """enum km_row_state."""

    FREE = 0
    PENDING = 1
    RING = 2
    KERNEL = 3


class Role(enum.IntEnum):
    """enum km_role."""

    UNKNOWN = 0
    CONNECTOR = 1
    ACCEPTOR = 2


# Before the four bytes of an IPv4 address.
V4_MAPPED = bytes(10) + b"\xff\xff"


class Endpoint(NamedTuple):
    """An address and a port; IPv4 addresses are v4-mapped in the sixteen bytes."""

    raw: bytes
    port: int

    @property
    def address(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        """The address; a v4-mapped one is an IPv4 address here."""
        return _address(self.raw)

    def __str__(self) -> str:
        return f"{_address_text(self.raw)}:{self.port}"


# Many connections have few addresses between them.
@functools.lru_cache(maxsize=4096)
def _address(raw: bytes) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.IPv6Address(raw)
    return address.ipv4_mapped or address


@functools.lru_cache(maxsize=4096)
def _address_text(raw: bytes) -> str:
    address = _address(raw)
    return f"[{address}]" if address.version == 6 else str(address)


class Row(NamedTuple):
    """One connection, as the process that upgraded it describes it."""

    number: int
    state: RowState
    role: Role
    reason: int
    transport: int
    inode: int
    fd: int
    pid: int
    local: Endpoint
    peer: Endpoint
    original_dst: Endpoint | None
    ring_size: int
    generation: int
    ring_rx_bytes: int
    ring_tx_bytes: int
    kernel_rx_bytes: int
    kernel_tx_bytes: int
    rx_seen: int
    tx_seen: int
    token: bytes
    # Its address in the memory of process pid.
    segment: int


@dataclass(frozen=True)
class Statistics:
    """The whole memfd at one moment."""

    pid: int
    comm: str
    counters: tuple[int, ...]
    reasons: tuple[int, ...]
    rows: tuple[Row, ...]


_STATES = {int(state): state for state in RowState}
_ROLES = {int(role): role for role in Role}


def decode_row(raw: bytes, offset: int, index: int) -> Row | None:
    """The row at offset; None if it is free."""
    (
        state,
        role,
        reason,
        transport,
        inode,
        fd,
        pid,
        lport,
        pport,
        oport,
        _,
        laddr,
        paddr,
        oaddr,
        *sizes_and_counts,
        token,
        segment,
    ) = ROW.unpack_from(raw, offset)
    if state == RowState.FREE:
        return None
    if state not in _STATES or role not in _ROLES:
        raise NotStatistics(f"row {index}: state {state}, role {role}")
    return Row._make(
        (
            index,
            _STATES[state],
            _ROLES[role],
            reason,
            transport,
            inode,
            fd,
            pid,
            Endpoint(laddr, lport),
            Endpoint(paddr, pport),
            Endpoint(oaddr, oport) if oport else None,
            *sizes_and_counts,
            token,
            segment,
        )
    )


def _state(raw: bytes, offset: int) -> int:
    return int.from_bytes(raw[offset : offset + 4], sys.byteorder)


def _generation(raw: bytes, offset: int) -> bytes:
    return raw[offset + 92 : offset + 96]


def _read_fully(fd: int, length: int, offset: int) -> bytes:
    raw = os.pread(fd, length, offset)
    if len(raw) < length:
        raise NotStatistics(f"the file ends within {length} bytes at {offset}")
    return raw


def is_made(fd: int) -> bool:
    """Whether the owner has filled in the header, whose magic number it stores last."""
    return any(os.pread(fd, 8, 0))


def has_magic(fd: int) -> bool:
    """Whether it is such a file at all."""
    return os.pread(fd, 8, 0) == MAGIC.to_bytes(8, sys.byteorder)


def _rows(fd: int, header_size: int, row_size: int, used: int) -> list[Row]:
    rows = []
    for first in range(0, used, _BATCH):
        count = min(_BATCH, used - first)
        at = header_size + first * row_size
        before = _read_fully(fd, count * row_size, at)
        again = _read_fully(fd, count * row_size, at)
        for offset in range(0, count * row_size, row_size):
            # Most of a long-lived table is free.
            if _state(before, offset) == RowState.FREE:
                continue
            index = first + offset // row_size
            raw, place = again, offset
            attempts = 0
            steady = _generation(before, offset) == _generation(again, offset)
            while not steady and attempts < _ATTEMPTS:
                newer = _read_fully(fd, row_size, at + offset)
                steady = _generation(raw, place) == _generation(newer, 0)
                raw, place = newer, 0
                attempts += 1
            if steady and (row := decode_row(raw, place, index)) is not None:
                rows.append(row)
    return rows


def read_statistics(fd: int) -> Statistics:
    """Decodes the memfd open at fd; raises NotStatistics if it is something else.

    The owner goes on writing meanwhile.  A row whose generation changed while it was
    being read belongs to two connections at once and is read again.  A connection that
    is closed moves its bytes from its row to the counters: if those have changed, all
    is read again, a few times; then its bytes may be missing, but not be there twice.
    """
    head = _read_fully(fd, HEADER.size, 0)
    magic, version, header_size, row_size, row_count, used, pid, comm = HEADER.unpack(
        head
    )
    if magic != MAGIC:
        raise NotStatistics(f"the magic number is {magic:#x}")
    if version != VERSION:
        raise NotStatistics(f"version {version} is not {VERSION}")
    if not ROW.size <= row_size <= _MOST_ROW_SIZE or used > min(row_count, _MOST_ROWS):
        raise NotStatistics(f"rows of {row_size} bytes, {used} of {row_count} used")
    for _ in range(_ATTEMPTS):
        counters = _TABLE.unpack(_read_fully(fd, _TABLE.size, COUNTERS_OFFSET))
        rows = _rows(fd, header_size, row_size, used)
        after = _TABLE.unpack(_read_fully(fd, _TABLE.size, COUNTERS_OFFSET))
        if counters[CLOSED_BYTES] == after[CLOSED_BYTES]:
            break
    return Statistics(
        pid=pid,
        comm=comm.split(b"\0", 1)[0].decode(errors="replace"),
        counters=counters,
        reasons=_TABLE.unpack(_read_fully(fd, _TABLE.size, REASONS_OFFSET)),
        rows=tuple(rows),
    )
