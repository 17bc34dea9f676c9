# SPDX-License-Identifier: Apache-2.0
"""A segment of other processes, read from outside.

Root maps it: then it stays after both processes have closed it.  The owner of the
processes reads it out of one of them, as a debugger would, as long as it is there.
What the kernel asks for is in docs/tap.md.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
from dataclasses import dataclass
from typing import Protocol

from kmap import procfs

HEADER = 4096
_MAGIC = int.from_bytes(b"KAMPSEG1", "little")
# Of the header: magic, token, both rings.
_USED = 128 + 2 * 384
_LEVELS = 3
_FIRST = 16384
_STEP = 4
_SMALLEST, _LARGEST = 4096, 1 << 24


class Gone(Exception):
    """The segment is not there any more."""


def keeps_its_size(fd: int) -> bool:
    """Whether a memfd is sealed against shrinking, which would be a SIGBUS to us.

    Its owner may be anybody.  OSError if it is another kind of file.
    """
    return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)


@dataclass(frozen=True)
class Geometry:
    """Sizes of a ring's levels, and where each starts in the ring's data."""

    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    total: int


def geometry(ring_size: int) -> Geometry:
    """The levels of a ring that grows to ring_size bytes; ValueError if none does."""
    if not _SMALLEST <= ring_size <= _LARGEST or ring_size & (ring_size - 1):
        raise ValueError(f"no ring has {ring_size} bytes")
    sizes = [min(ring_size, _FIRST)]
    while sizes[-1] < ring_size:
        last = len(sizes) == _LEVELS - 1
        sizes.append(ring_size if last else min(sizes[-1] * _STEP, ring_size))
    offsets = [sum(sizes[:index]) for index in range(len(sizes))]
    return Geometry(tuple(sizes), tuple(offsets), sum(sizes))


@dataclass(frozen=True)
class Header:
    """Words of a segment's header, by 8 and by 4 bytes; each a single load."""

    long: memoryview
    word: memoryview


class Memory(Protocol):
    """A segment."""

    # It can still be read when nobody else has it any more.
    lasting: bool

    def header(self) -> Header:
        """As it is now, or from now on.  Raises Gone."""

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of it, of which some may have changed meanwhile.  Raises Gone."""

    def close(self) -> None:
        """Gives it up."""


def _views(raw: memoryview) -> Header:
    return Header(raw.cast("Q"), raw.cast("I"))


def _is_it(header: Header, token: bytes) -> bool:
    name = header.long[3].to_bytes(8, sys.byteorder)
    name += header.long[4].to_bytes(8, sys.byteorder)
    return header.long[0] == _MAGIC and name == token


class Mapped:
    """Mapped into this process."""

    lasting = True

    def __init__(self, pid: int, address: int, size: int, token: bytes) -> None:
        """PermissionError without CAP_CHECKPOINT_RESTORE; Gone if it is not there."""
        # A mapping ends where the file does: at a whole number of pages.
        name = f"/proc/{pid}/map_files/{address:x}-{address + size:x}"
        try:
            fd = procfs.open_regular(name)
        except PermissionError:
            raise
        except OSError as error:
            # Not mapped there any more, or the process has ended.
            raise Gone from error
        try:
            if not keeps_its_size(fd) or os.fstat(fd).st_size != size:
                raise Gone
            self._map = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
        except OSError as error:
            raise Gone from error
        finally:
            os.close(fd)
        self._raw = memoryview(self._map)
        self._header = _views(self._raw[:HEADER])
        if not _is_it(self._header, token):
            self.close()
            raise Gone

    def header(self) -> Header:
        return self._header

    def read(self, offset: int, length: int) -> bytes:
        return self._map[offset : offset + length]

    def close(self) -> None:
        self._header.long.release()
        self._header.word.release()
        self._raw.release()
        self._map.close()


class Remote:
    """Read out of a process that has it, through /proc/PID/mem."""

    lasting = False

    def __init__(self, fd: int, address: int, token: bytes) -> None:
        """Borrows fd.  Gone if something else is there."""
        self._fd = fd
        self._address = address
        self._token = token
        self._raw = bytearray(_USED)
        self._header = _views(memoryview(self._raw))
        self.header()

    def header(self) -> Header:
        # The address may be another segment's by now, which has another token.
        try:
            got = os.preadv(self._fd, [self._raw], self._address)
        except OSError as error:
            raise Gone from error
        if got != _USED or not _is_it(self._header, self._token):
            raise Gone
        return self._header

    def read(self, offset: int, length: int) -> bytes:
        try:
            raw = os.pread(self._fd, length, self._address + offset)
        except OSError as error:
            raise Gone from error
        if len(raw) != length:
            raise Gone
        return raw

    def close(self) -> None:
        pass
