# SPDX-License-Identifier: Apache-2.0
"""Finds processes that have the library, and their TCP sockets, through /proc.

Everything here races with the processes it looks at: what disappears while it is
being read is left out, never an error.  Other users' processes need root to read.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import os
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from kmap import wire
from kmap.native import PRELOAD_NAME
from kmap.wire import Endpoint

STATISTICS_LINK = "/memfd:kmap-stats"
# Where memfd_create is refused it is a file without a name, as others may have too.
UNNAMED_LINK = "/dev/shm/#"
_SOCKET_LINK = re.compile(r"socket:\[(\d+)\]")

# The smallest limit of which the library takes a few numbers.
INSIDE_LEAST = 1024

# Numbers of include/net/tcp_states.h that matter here.
ESTABLISHED = 0x01
LISTEN = 0x0A
# Time-wait and new-request sockets belong to no process.
_OWNED = frozenset({0x01, 0x02, 0x04, 0x05, 0x08, 0x09, 0x0B})


@dataclass(frozen=True)
class TcpSocket:
    """One line of /proc/net/tcp or tcp6."""

    inode: int
    local: Endpoint
    peer: Endpoint
    state: int
    uid: int
    rx_queue: int
    tx_queue: int

    @property
    def connected(self) -> bool:
        """Whether it is one end of a connection, open at least one way."""
        return self.state in _OWNED


@dataclass(frozen=True)
class StatisticsFile:
    """A statistics memfd that a process has open."""

    identity: tuple[int, int]
    path: str


@dataclass(frozen=True)
class Process:
    """What can be seen of one process."""

    pid: int
    comm: str
    network: int
    has_library: bool
    disabled: bool
    # Its limit leaves the library no place for descriptors of its own.
    cannot_hide: bool
    # inode of the socket -> lowest descriptor
    sockets: dict[int, int]
    statistics: tuple[StatisticsFile, ...]


def _pids() -> Iterator[int]:
    with os.scandir("/proc") as entries:
        for entry in entries:
            if entry.name.isdigit():
                yield int(entry.name)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def has_library(pid: int) -> bool:
    """Whether the preload library is mapped into the process."""
    try:
        # A replaced file is listed with " (deleted)" behind its name.
        maps = _read(f"/proc/{pid}/maps")
    except OSError:
        return False
    return f"/{PRELOAD_NAME}".encode() in maps


def comm(pid: int) -> str:
    """The short name of a process; empty when it is gone."""
    try:
        return _read(f"/proc/{pid}/comm").decode(errors="replace").rstrip("\n")
    except OSError:
        return ""


def _disabled(pid: int) -> bool:
    try:
        return b"KMAP_DISABLE=1" in _read(f"/proc/{pid}/environ").split(b"\0")
    except OSError:
        return False


def _cannot_hide(pid: int) -> bool:
    """Whether RLIMIT_NOFILE is small, and cannot be raised (core/fd/hidden.c)."""
    try:
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    except OSError:
        return False
    return soft == hard < INSIDE_LEAST


def open_statistics(pid: int) -> tuple[StatisticsFile, ...]:
    """The statistics memfds that the process has open, each once."""
    return _descriptors(pid)[1]


def _is_statistics(path: str) -> bool:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return wire.has_magic(fd)
    finally:
        os.close(fd)


def links(pid: int) -> dict[int, str]:
    """What each descriptor of the process leads to, such as "socket:[4711]"."""
    found: dict[int, str] = {}
    directory = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(directory), key=int):
            with contextlib.suppress(OSError):
                found[int(name)] = os.readlink(f"{directory}/{name}")
    return found


def _descriptors(pid: int) -> tuple[dict[int, int], tuple[StatisticsFile, ...]]:
    sockets: dict[int, int] = {}
    statistics: dict[tuple[int, int], StatisticsFile] = {}
    for fd, link in links(pid).items():
        path = f"/proc/{pid}/fd/{fd}"
        with contextlib.suppress(OSError):
            if match := _SOCKET_LINK.fullmatch(link):
                sockets.setdefault(int(match[1]), fd)
            elif link.startswith(STATISTICS_LINK) or (
                link.startswith(UNNAMED_LINK) and _is_statistics(path)
            ):
                status = os.stat(path)
                identity = (status.st_dev, status.st_ino)
                statistics.setdefault(identity, StatisticsFile(identity, path))
    return sockets, tuple(statistics.values())


def process(pid: int) -> Process | None:
    """The process, or None if it is gone or may not be looked at."""
    try:
        network = os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return None
    library = has_library(pid)
    sockets, statistics = _descriptors(pid)
    return Process(
        pid=pid,
        comm=comm(pid),
        network=network,
        has_library=library,
        disabled=library and _disabled(pid),
        cannot_hide=library and _cannot_hide(pid),
        sockets=sockets,
        statistics=statistics if library else (),
    )


def processes() -> list[Process]:
    """Every process that can be looked at, by pid."""
    return [found for pid in sorted(_pids()) if (found := process(pid)) is not None]


def exists(pid: int) -> bool:
    """Whether there is such a process."""
    return os.path.isdir(f"/proc/{pid}")


def children(pid: int) -> list[int]:
    """The children of every thread of the process."""
    found: list[int] = []
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for task in tasks:
        with contextlib.suppress(OSError):
            raw = _read(f"/proc/{pid}/task/{task}/children")
            found.extend(int(child) for child in raw.split())
    return found


def descendants(pid: int) -> list[int]:
    """The process and everything below it in the tree."""
    found = [pid]
    for parent in found:
        found.extend(child for child in children(parent) if child not in found)
    return found


# Many sockets have few addresses between them.
@functools.lru_cache(maxsize=4096)
def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    # Four-byte words of the network-order address, each printed as a host integer.
    words = (int(text[i : i + 8], 16) for i in range(0, len(text), 8))
    raw = b"".join(word.to_bytes(4, sys.byteorder) for word in words)
    if len(raw) == 4:
        return ipaddress.IPv4Address(raw)
    return Endpoint.from_bytes(raw, 0).address


def _endpoint(text: str) -> Endpoint:
    address, port = text.split(":")
    return Endpoint(_address(address), int(port, 16))


def parse_tcp(text: str) -> Iterator[TcpSocket]:
    """The sockets in the text of /proc/net/tcp or tcp6."""
    for line in text.splitlines()[1:]:
        fields = line.split()
        tx_queue, rx_queue = fields[4].split(":")
        yield TcpSocket(
            inode=int(fields[9]),
            local=_endpoint(fields[1]),
            peer=_endpoint(fields[2]),
            state=int(fields[3], 16),
            uid=int(fields[7]),
            rx_queue=int(rx_queue, 16),
            tx_queue=int(tx_queue, 16),
        )


def tcp_sockets(pid: int) -> list[TcpSocket] | None:
    """All TCP sockets of the network namespace that the process is in.

    None if the process went away meanwhile: another one may still show them.
    """
    directory = f"/proc/{pid}/net"
    try:
        found = list(parse_tcp(_read(f"{directory}/tcp").decode()))
        # Hosts without IPv6 have no such file.
        if os.path.exists(f"{directory}/tcp6"):
            found.extend(parse_tcp(_read(f"{directory}/tcp6").decode()))
        os.stat(f"{directory}/tcp")
    except OSError:
        return None
    return found


def read_statistics(file: StatisticsFile) -> wire.Statistics | None:
    """The content; None when the last holder is gone, or is just making it."""
    try:
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # The descriptor may have been reused for another file since it was listed.
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != file.identity:
            return None
        return wire.read_statistics(fd) if wire.is_made(fd) else None
    finally:
        os.close(fd)
