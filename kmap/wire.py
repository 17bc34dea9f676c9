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


@dataclass(frozen=True, order=True)
class Endpoint:
    """An address and a port; v4-mapped addresses are IPv4 addresses here."""

    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int

    @classmethod
    def from_bytes(cls, raw: bytes, port: int) -> Endpoint:
        """From sixteen bytes, IPv4 as v4-mapped."""
        return cls(_address(raw), port)

    def __str__(self) -> str:
        if self.address.version == 6:
            return f"[{self.address}]:{self.port}"
        return f"{self.address}:{self.port}"


# Many connections have few addresses between them.
@functools.lru_cache(maxsize=4096)
def _address(raw: bytes) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.IPv6Address(raw)
    return address.ipv4_mapped or address


@dataclass(frozen=True)
class Row:
    """One connection, as the process that upgraded it describes it."""

    index: int
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
        ring_size,
        generation,
        ring_rx,
        ring_tx,
        kernel_rx,
        kernel_tx,
        rx_seen,
        tx_seen,
        token,
        segment,
    ) = ROW.unpack_from(raw, offset)
    if state == RowState.FREE:
        return None
    try:
        return Row(
            index=index,
            state=RowState(state),
            role=Role(role),
            reason=reason,
            transport=transport,
            inode=inode,
            fd=fd,
            pid=pid,
            local=Endpoint.from_bytes(laddr, lport),
            peer=Endpoint.from_bytes(paddr, pport),
            original_dst=Endpoint.from_bytes(oaddr, oport) if oport else None,
            ring_size=ring_size,
            generation=generation,
            ring_rx_bytes=ring_rx,
            ring_tx_bytes=ring_tx,
            kernel_rx_bytes=kernel_rx,
            kernel_tx_bytes=kernel_tx,
            rx_seen=rx_seen,
            tx_seen=tx_seen,
            token=token,
            segment=segment,
        )
    except ValueError as error:
        raise NotStatistics(f"row {index}: {error}") from error


def _state(raw: bytes) -> int:
    return int.from_bytes(raw[0:4], sys.byteorder)


def _generation(raw: bytes) -> int:
    return int.from_bytes(raw[92:96], sys.byteorder)


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


def read_statistics(fd: int) -> Statistics:
    """Decodes the memfd open at fd; raises NotStatistics if it is something else.

    The owner goes on writing meanwhile.  A row whose generation changed while it was
    being read belongs to two connections at once and is read again.
    """
    head = _read_fully(fd, HEADER.size, 0)
    magic, version, header_size, row_size, row_count, used, pid, comm = HEADER.unpack(
        head
    )
    if magic != MAGIC:
        raise NotStatistics(f"the magic number is {magic:#x}")
    if version != VERSION:
        raise NotStatistics(f"version {version} is not {VERSION}")
    if row_size < ROW.size or used > row_count:
        raise NotStatistics(f"rows of {row_size} bytes, {used} of {row_count} used")
    counters = _TABLE.unpack(_read_fully(fd, _TABLE.size, COUNTERS_OFFSET))
    reasons = _TABLE.unpack(_read_fully(fd, _TABLE.size, REASONS_OFFSET))
    rows = []
    before = _read_fully(fd, used * row_size, header_size)
    for index in range(used):
        raw = before[index * row_size : (index + 1) * row_size]
        for _ in range(_ATTEMPTS):
            # Free rows cost no second look: most of a long-lived table is free.
            if _state(raw) == RowState.FREE:
                break
            again = _read_fully(fd, row_size, header_size + index * row_size)
            if _generation(raw) == _generation(again):
                row = decode_row(again, 0, index)
                if row is not None:
                    rows.append(row)
                break
            raw = again
    return Statistics(
        pid=pid,
        comm=comm.split(b"\0", 1)[0].decode(errors="replace"),
        counters=counters,
        reasons=reasons,
        rows=tuple(rows),
    )
