# SPDX-License-Identifier: Apache-2.0
"""Makes calls of events: who called what, on which connection, with which result."""

from __future__ import annotations

import dataclasses
import errno
import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kmap import native, procfs
from kmap.demo import syscalls
from kmap.trace.recording import (
    ANSWERED,
    OTHER,
    RING,
    STACK,
    WAIT,
    WAKE_UP,
    Call,
)
from kmap.trace.tracefs import Event

# What the kernel and strace call differently.
_NAMES = {"sendfile64": "sendfile", "newfstat": "fstat", "newfstatat": "fstatat"}
# The names of arguments that are descriptors (kernel, include/linux/syscalls.h).
_FD_ARGUMENTS = ("fd", "epfd", "out_fd", "fildes", "fd_in", "oldfd")
_SHUT_RD = 0
_F_DUPFD = (0, 1030)
_OPENS = ("openat", "open", "openat2", "creat", "memfd_create", "timerfd_create")
_SENDS = ("write", "writev", "pwritev2", "sendto", "sendmsg", "sendfile", "send")
_RECEIVES = ("read", "readv", "preadv2", "recvfrom", "recvmsg", "recv")
# Calls of the tracing itself: how the kernel comes back from a recorded function.
_OURS = frozenset({"uretprobe", "uprobe"})

# Kernel, include/linux/errno.h: poll, futex and others with a time limit, when a tracer
# or a stop interrupts them.
_ERESTART_RESTARTBLOCK = 516
# Nothing but a socket gives these another error than ENOTSOCK.
_OF_SOCKETS = syscalls.STACK - frozenset(
    (
        *("read", "readv", "preadv2", "write", "writev", "pwritev2"),
        *("sendfile", "splice", "ioctl", "close", "socket"),
    )
)

LISTENER, UNIX, FILE, UNKNOWN = "listener", "unix socket", "file", ""
# A descriptor that came by SCM_RIGHTS.
PASSED = "passed socket"


@functools.cache
def _waits() -> frozenset[str]:
    table = native.symbol_table()
    return frozenset(each.name for each in table if each.subject == "READINESS")


def functions() -> tuple[str, ...]:
    """The library's functions that can make do without the kernel."""
    return tuple(
        symbol.name
        for symbol in native.symbol_table()
        if symbol.class_name == "RING"
        and symbol.subject in ("BYTES", "READINESS", "OPTIONS")
    )


@dataclass(frozen=True)
class Hops:
    """The names of connections, by the port that their server listens on."""

    ports: Mapping[int, str]

    def name(self, *ports: int) -> str:
        """A hop of the request, or another connection."""
        for port in ports:
            if port in self.ports:
                return self.ports[port]
        return "other connection"


class Descriptors:
    """What the descriptors of one process are, as far as anybody can say."""

    def __init__(self, hops: Hops, pid: int | None = None) -> None:
        self._hops = hops
        self._listening: dict[int, int] = {}
        self.what: dict[int, str] = {}
        if pid is not None:
            self._look(pid)

    def _look(self, pid: int) -> None:
        tcp = {each.inode: each for each in procfs.tcp_sockets(pid) or ()}
        for fd, link in procfs.links(pid).items():
            kind, _, rest = link.partition(":")
            if kind == "socket":
                each = tcp.get(int(rest.strip("[]")))
                if each is None:
                    self.what[fd] = UNIX
                elif each.state == procfs.LISTEN:
                    self.what[fd] = LISTENER
                    self._listening[fd] = each.local.port
                else:
                    self.what[fd] = self._hops.name(each.peer.port, each.local.port)
            elif kind == "anon_inode":
                self.what[fd] = rest.strip("[]")
            else:
                self.what[fd] = kind if kind == "pipe" else FILE

    def is_socket(self, fd: int) -> bool:
        """Whether it is a socket of any kind."""
        what = self.what.get(fd, UNKNOWN)
        return what not in (UNKNOWN, FILE, "pipe", "eventpoll", "eventfd", "timerfd")

    def follow(self, name: str, arguments: Mapping[str, int], result: int) -> None:
        """Takes note of a call that makes or ends descriptors."""
        fd = next(iter(arguments.values()), -1)
        if name == "close":
            self.what.pop(fd, None)
            self._listening.pop(fd, None)
        if result < 0:
            return
        if name == "socket":
            inet = arguments.get("family") in (2, 10)
            self.what[result] = "unconnected socket" if inet else UNIX
        elif name in ("accept", "accept4"):
            self.what[result] = self._hops.name(self._listening.get(fd, 0))
        elif name in ("dup", "dup2", "dup3"):
            self.what[result] = self.what.get(fd, UNKNOWN)
        elif name in ("epoll_create", "epoll_create1"):
            self.what[result] = "eventpoll"
        elif name == "eventfd2":
            self.what[result] = "eventfd"
        elif name in _OPENS:
            self.what[result] = FILE
        elif name == "fcntl" and arguments.get("cmd") in _F_DUPFD:
            self.what[result] = self.what.get(fd, UNKNOWN)
        elif name in ("socketpair", "pipe", "pipe2"):
            # The numbers are in the program's memory; they are the lowest free ones.
            for _ in range(2):
                lowest = next(n for n in itertools.count() if n not in self.what)
                self.what[lowest] = UNIX if name == "socketpair" else "pipe"

    def dialled(self, fd: int, port: int) -> None:
        """connect() of fd went to a port."""
        self.what[fd] = self._hops.name(port)


@dataclass
class _Frame:
    """A call into the library that has not returned."""

    name: str
    fd: int
    began: float
    results: list[tuple[str, int]] = field(default_factory=list)


@dataclass
class _Open:
    """A system call that has not returned."""

    name: str
    began: float
    arguments: Mapping[str, int]


def _way(name: str, result: int) -> tuple[int, str]:
    base = name.removesuffix("64").removeprefix("__").removesuffix("_chk")
    base = base.replace("64v2", "v2")
    if result > 0 and base in _SENDS:
        return result, "out"
    if result > 0 and base in _RECEIVES:
        return result, "in"
    return 0, ""


class Assembler:
    """Goes through a recording; the marks "begin" and "end" enclose each request.

    A later "begin" takes the place of an earlier one, and "undo" drops a request.
    """

    def __init__(
        self,
        roles: Mapping[int, str],
        descriptors: Mapping[int, Descriptors],
        hops: Hops,
        newcomer: str,
    ) -> None:
        # By process; one that is not in it was started by the newcomer's.
        self._roles = dict(roles)
        self._newcomer = newcomer
        self._descriptors = dict(descriptors)
        self._hops = hops
        self._open: dict[int, _Open] = {}
        self._interrupted: dict[int, _Open] = {}
        self._frames: dict[int, list[_Frame]] = {}
        self._calls: list[Call] = []
        self._began: float | None = None
        self.requests: list[list[Call]] = []

    def run(self, events: Iterable[Event]) -> list[list[Call]]:
        """The calls of each request that returned before it ended, in order."""
        for event in events:
            if event.kind == "mark":
                self._mark(event)
            elif event.name not in _OURS:
                getattr(self, f"_{event.kind}")(event)
        return self.requests

    def _mark(self, event: Event) -> None:
        if event.name == "begin":
            self._began, self._calls = event.at_us, []
        elif event.name == "undo":
            self.requests.pop()
        elif event.name == "end" and self._began is not None:
            self.requests.append(_from_first(self._calls))
            self._began = None

    def _of(self, pid: int) -> Descriptors:
        return self._descriptors.setdefault(pid, Descriptors(self._hops))

    def _enter(self, event: Event) -> None:
        name = _NAMES.get(event.name, event.name)
        call = _Open(name, event.at_us, event.arguments or {})
        if name == "restart_syscall":
            call = self._interrupted.pop(event.tid, call)
        self._open[event.tid] = call

    def _dial(self, event: Event) -> None:
        call = self._open.get(event.tid)
        if call is not None and "fd" in call.arguments:
            self._of(event.pid).dialled(call.arguments["fd"], event.value)

    def _exit(self, event: Event) -> None:
        call = self._open.pop(event.tid, None)
        if call is None:
            # It began before the recording did.
            name = _NAMES.get(event.name, event.name)
            call = _Open(name, self._began or event.at_us, {})
        if event.value == -_ERESTART_RESTARTBLOCK:
            # It goes on as restart_syscall, and the program knows nothing of that.
            self._interrupted[event.tid] = call
            return
        known = self._of(event.pid)
        fd = -1
        first = next(iter(call.arguments), "")
        if first in _FD_ARGUMENTS:
            fd = call.arguments[first]
        if call.name in _OF_SOCKETS and event.value != -errno.ENOTSOCK and fd >= 0:
            known.what.setdefault(fd, PASSED)
        kind, what = self._kind(call, fd, known)
        self._add(event, call.name, call.began, fd, kind, what)
        for frame in self._frames.get(event.tid, ()):
            frame.results.append((kind, event.value))
        known.follow(call.name, call.arguments, event.value)

    def _kind(self, call: _Open, fd: int, known: Descriptors) -> tuple[str, str]:
        what = known.what.get(fd, UNKNOWN) if fd >= 0 else UNKNOWN
        if call.name in syscalls.WAITS:
            return WAIT, what
        if call.name == "futex":
            return WAKE_UP, "futex"
        if call.name == "shutdown" and call.arguments.get("how") == _SHUT_RD:
            return WAKE_UP, "latch"
        if call.name == "write" and what == "eventfd":
            return WAKE_UP, what
        if call.name == "socket":
            return STACK, "unconnected socket"
        if call.name in syscalls.STACK and known.is_socket(fd):
            return STACK, what
        return OTHER, what

    def _call(self, event: Event) -> None:
        frames = self._frames.setdefault(event.tid, [])
        name = _NAMES.get(event.name, event.name)
        frames.append(_Frame(name, event.value, event.at_us))

    def _back(self, event: Event) -> None:
        frames = self._frames.get(event.tid, [])
        name = _NAMES.get(event.name, event.name)
        if not any(frame.name == name for frame in frames):
            return
        frame = frames.pop()
        # One that was left by a jump never comes back.
        while frame.name != name:
            frame = frames.pop()
        known = self._of(event.pid)
        if frame.name in _waits():
            if not any(kind == WAIT for kind, _ in frame.results):
                self._add(event, frame.name, frame.began, frame.fd, ANSWERED, "")
        elif known.is_socket(frame.fd):
            # The library returns -1 and errno, which nobody sees here.
            result = -1 if event.value < 0 else event.value
            asked = [
                value if value >= 0 else -1
                for kind, value in frame.results
                if kind == STACK
            ]
            if result not in asked:
                what = known.what[frame.fd]
                self._add(event, frame.name, frame.began, frame.fd, RING, what)

    def _add(
        self, event: Event, name: str, began: float, fd: int, kind: str, what: str
    ) -> None:
        if self._began is None:
            return
        count, way = _way(name, event.value)
        self._calls.append(
            Call(
                began_us=began - self._began,
                ended_us=event.at_us - self._began,
                role=self._roles.get(event.pid, self._newcomer),
                pid=event.pid,
                tid=event.tid,
                name=name,
                fd=fd,
                what=what,
                kind=kind,
                result=event.value,
                bytes=count,
                way=way,
            )
        )


def _from_first(calls: Sequence[Call]) -> list[Call]:
    """Calls in order, with times from the first that carries bytes of the request."""
    carrying = (call for call in calls if call.kind in (STACK, RING))
    zero = min((call.began_us for call in carrying), default=0.0)
    moved = [
        dataclasses.replace(
            call, began_us=call.began_us - zero, ended_us=call.ended_us - zero
        )
        for call in calls
    ]
    return sorted(moved, key=lambda call: call.at_us)


# A call, as far as two requests are the same when they make it.
_Key = tuple[str, str, str, str, int]


def signature(calls: Sequence[Call]) -> tuple[_Key, ...]:
    """What a request did, program by program; times and threads may differ."""
    return tuple(
        sorted(
            (
                (each.role, each.kind, each.name, each.what, each.result)
                for each in calls
                if each.kind != OTHER
            ),
            key=lambda key: key[0],
        )
    )


def most_frequent(requests: Sequence[Sequence[Call]]) -> tuple[int, int]:
    """The first request that did what most did, by number, and how many did that.

    Of what equally many did, that with the fewest calls: nothing else disturbed it.
    """
    keys = [signature(calls) for calls in requests]
    counts = Counter(keys)
    key = max(counts, key=lambda each: (counts[each], -len(each)))
    return keys.index(key), counts[key]
