# SPDX-License-Identifier: Apache-2.0
"""Finds processes that have the library, and their TCP sockets, through /proc.

Everything here races with the processes it looks at: what disappears while it is
being read is left out, never an error.  Other users' processes need root to read.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import resource
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from kmap import wire
from kmap.native import PRELOAD_NAMES
from kmap.wire import Endpoint

STATISTICS_LINK = "/memfd:kmap-stats"
# Where memfd_create is refused it is a file without a name, as others may have too.
UNNAMED_LINK = "/dev/shm/#"
_SOCKET_LINK = "socket:["
_MAPS_PART = 1 << 16
# include/linux/sched.h; such a process has no memory of its own.
_PF_KTHREAD = 0x00200000

# The smallest limit of which the library takes a few numbers.
INSIDE_LEAST = 1024

# Numbers of include/net/tcp_states.h that matter here.
ESTABLISHED = 0x01
LISTEN = 0x0A
# Time-wait and new-request sockets belong to no process.
_OWNED = frozenset({0x01, 0x02, 0x04, 0x05, 0x08, 0x09, 0x0B})


class TcpSocket(NamedTuple):
    """One TCP socket, from sock_diag or from a line of /proc/net/tcp or tcp6."""

    inode: int
    local: Endpoint
    peer: Endpoint
    state: int
    uid: int
    rx_queue: int
    tx_queue: int
    # Bytes that the program has taken from the kernel and given to it; None where
    # sock_diag cannot be asked.
    rx_bytes: int | None = None
    tx_bytes: int | None = None

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
    # In the innermost of its PID namespaces, which is the one that it knows.
    inner_pid: int
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
    """Whether a preload library is mapped into the process, for whichever libc."""
    names = [f"/{name}".encode() for name in PRELOAD_NAMES]
    longest = max(map(len, names))
    tail = b""
    try:
        # A replaced file is listed with " (deleted)" behind its name.  A process with
        # many connections has many mappings before it, and after it.
        with open(f"/proc/{pid}/maps", "rb", buffering=0) as maps:
            while part := maps.read(_MAPS_PART):
                text = tail + part
                if any(name in text for name in names):
                    return True
                tail = text[-longest:]
    except OSError:
        pass
    return False


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


def open_regular(path: str) -> int:
    """Opens a regular file to be read, and waits for nobody; OSError for others."""
    # Whoever has it open chose what it is: a FIFO would have us wait.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return fd


def _is_statistics(path: str) -> bool:
    fd = open_regular(path)
    try:
        return wire.has_magic(fd)
    finally:
        os.close(fd)


def links(pid: int) -> dict[int, str]:
    """What each descriptor of the process leads to, such as "socket:[4711]"."""
    found: dict[int, str] = {}
    try:
        # Relative to the directory each of them is looked up sooner.
        at = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return found
    try:
        for number in sorted(map(int, os.listdir(at))):
            with contextlib.suppress(OSError):
                found[number] = os.readlink(str(number), dir_fd=at)
    except OSError:
        # It ended while it was being listed.
        pass
    finally:
        os.close(at)
    return found


def _descriptors(pid: int) -> tuple[dict[int, int], tuple[StatisticsFile, ...]]:
    sockets: dict[int, int] = {}
    statistics: dict[tuple[int, int], StatisticsFile] = {}
    for fd, link in links(pid).items():
        if link.startswith(_SOCKET_LINK):
            sockets.setdefault(int(link[len(_SOCKET_LINK) : -1]), fd)
            continue
        path = f"/proc/{pid}/fd/{fd}"
        with contextlib.suppress(OSError):
            if link.startswith(STATISTICS_LINK) or (
                link.startswith(UNNAMED_LINK) and _is_statistics(path)
            ):
                status = os.stat(path)
                identity = (status.st_dev, status.st_ino)
                statistics.setdefault(identity, StatisticsFile(identity, path))
    return sockets, tuple(statistics.values())


def _inner_pid(pid: int) -> int:
    try:
        for line in _read(f"/proc/{pid}/status").splitlines():
            if line.startswith(b"NSpid:"):
                return int(line.split()[-1])
    except OSError:
        pass
    return pid


def _is_kernel_thread(pid: int) -> bool:
    try:
        fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
        return bool(int(fields[6]) & _PF_KTHREAD)
    except OSError:
        return False


def may_be_looked_at(pid: int) -> bool:
    """False for a program of another user; kernel threads and the dead are no loss."""
    try:
        os.stat(f"/proc/{pid}/ns/net")
    except PermissionError:
        return _is_kernel_thread(pid)
    except OSError:
        pass
    return True


def _look_at(pid: int, *, library_only: bool) -> Process | None:
    try:
        network = os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return None
    library = has_library(pid)
    # Without the library it may be large and is of no interest.
    listed = library or not library_only
    sockets, statistics = _descriptors(pid) if listed else ({}, ())
    return Process(
        pid=pid,
        inner_pid=_inner_pid(pid) if library else pid,
        comm=comm(pid),
        network=network,
        has_library=library,
        disabled=library and _disabled(pid),
        cannot_hide=library and _cannot_hide(pid),
        sockets=sockets,
        statistics=statistics if library else (),
    )


def process(pid: int) -> Process | None:
    """The process, or None if it is gone or may not be looked at."""
    return _look_at(pid, library_only=False)


def survey() -> tuple[list[Process], int]:
    """The processes that have the library, by pid, and how many it may not look at."""
    found: list[Process] = []
    hidden = 0
    for pid in sorted(_pids()):
        each = _look_at(pid, library_only=True)
        if each is None:
            hidden += not may_be_looked_at(pid)
        elif each.has_library:
            found.append(each)
    return found, hidden


def cpu_ticks(pid: int) -> int:
    """User and system time of all its threads, in clock ticks; 0 when it is gone."""
    try:
        fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
        return int(fields[11]) + int(fields[12])
    except OSError:
        return 0


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
def _address(text: str) -> bytes:
    # Four-byte words of the network-order address, each printed as a host integer.
    words = (int(text[i : i + 8], 16) for i in range(0, len(text), 8))
    raw = b"".join(word.to_bytes(4, sys.byteorder) for word in words)
    return wire.V4_MAPPED + raw if len(raw) == 4 else raw


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


def open_file(file: StatisticsFile) -> int | None:
    """A descriptor of the memfd; None when its last holder is gone."""
    try:
        fd = open_regular(file.path)
    except OSError:
        return None
    status = os.fstat(fd)
    # The descriptor may have been reused for another file since it was listed.
    if (status.st_dev, status.st_ino) != file.identity:
        os.close(fd)
        return None
    return fd


def read_statistics(file: StatisticsFile) -> wire.Statistics | None:
    """The content; None when the last holder is gone, or is just making it."""
    fd = open_file(file)
    if fd is None:
        return None
    try:
        return wire.read_statistics(fd) if wire.is_made(fd) else None
    finally:
        os.close(fd)
