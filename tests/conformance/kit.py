# SPDX-License-Identifier: Apache-2.0
"""What the cases are written with: connected pairs, far ends, libc and waiting.

A case is a plain function that makes real socket calls and asserts what the
kernel promises.  It runs in a process of its own, once on the kernel, which
vouches for the case, and once under Kmap, where ``pair`` and ``far_pair`` return
only when both directions of the connection have moved to rings.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import pickle
import platform
import random
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

# Its number in a statistics row; not set on the kernel.
TRANSPORT_ENV = "CONFORMANCE_TRANSPORT"
UNDER_KMAP = TRANSPORT_ENV in os.environ

# Long enough for a loaded machine; the runner's watchdog is longer still.
PATIENCE = 8.0
PATIENCE_MS = int(PATIENCE * 1000)

# Longer than the kernel delays an acknowledgement on a quiet connection.
QUIET_MS = 50

# Round trips made before a pair is handed out.  The kernel run makes as many, so
# that a case starts from the same history in both modes.
ROUNDS = 64

T = TypeVar("T")
CaseFunction = Callable[..., None]


class Skip(Exception):
    """Raised by a case that this host cannot run, with the reason."""


# --- registering cases ----------------------------------------------------------


def each(*values: object) -> Callable[[CaseFunction], CaseFunction]:
    """The function is one case for each value, which it gets as its argument."""

    def mark(function: CaseFunction) -> CaseFunction:
        function.case_values = values  # type: ignore[attr-defined]
        return function

    return mark


def settings(**options: str) -> Callable[[CaseFunction], CaseFunction]:
    """Settings of the library that the case runs with, in Kmap mode."""

    def mark(function: CaseFunction) -> CaseFunction:
        function.case_settings = options  # type: ignore[attr-defined]
        return function

    return mark


# --- libc -----------------------------------------------------------------------

libc = ctypes.CDLL(None, use_errno=True)

_WIDE = frozenset(
    [
        "read",
        "write",
        "readv",
        "writev",
        "preadv",
        "pwritev",
        "preadv2",
        "pwritev2",
        "pread",
        "pwrite",
        "recv",
        "recvfrom",
        "recvmsg",
        "send",
        "sendto",
        "sendmsg",
        "sendfile",
        "sendfile64",
        "splice",
        "tee",
        "vmsplice",
        "copy_file_range",
        "syscall",
    ]
)
_UNTOUCHED = 4095  # the largest number the kernel uses for an error


def c(name: str, *args: Any) -> tuple[int, int]:
    """Calls libc's name; integers are passed 64 bits wide.  (result, errno).

    errno is 0 for a success, which must also have left errno as it was.
    """
    function = getattr(libc, name)
    function.restype = ctypes.c_ssize_t if name in _WIDE else ctypes.c_int
    ctypes.set_errno(_UNTOUCHED)
    result: int = function(
        *(ctypes.c_long(a) if isinstance(a, int) else a for a in args)
    )
    if result == -1:
        return -1, ctypes.get_errno()
    assert ctypes.get_errno() == _UNTOUCHED, f"{name} succeeded and changed errno"
    return result, 0


def ok(name: str, *args: Any) -> int:
    """Like c, for a call that must succeed; OSError when it does not."""
    result, error = c(name, *args)
    if result == -1:
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result


def fails(name: str, *args: Any) -> int:
    """Like c, for a call that must fail; the error number."""
    result, error = c(name, *args)
    assert result == -1, f"{name} returned {result}"
    return error


class IoVec(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


class MsgHdr(ctypes.Structure):
    """struct msghdr."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint32),
        ("iov", ctypes.POINTER(IoVec)),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class MMsgHdr(ctypes.Structure):
    """struct mmsghdr."""

    _fields_ = (("hdr", MsgHdr), ("len", ctypes.c_uint32))


class TimeSpec(ctypes.Structure):
    """struct timespec."""

    _fields_ = (("sec", ctypes.c_long), ("nsec", ctypes.c_long))


class PollFd(ctypes.Structure):
    """struct pollfd."""

    _fields_ = (
        ("fd", ctypes.c_int),
        ("events", ctypes.c_short),
        ("revents", ctypes.c_short),
    )


class EpollEvent(ctypes.Structure):
    """struct epoll_event, which is packed on x86-64 alone."""

    if platform.machine() == "x86_64":
        _pack_ = 1
    _fields_ = (("events", ctypes.c_uint32), ("data", ctypes.c_uint64))


Buffer = ctypes.Array[ctypes.c_char]


def buffers(*sizes: int) -> list[Buffer]:
    return [ctypes.create_string_buffer(b"", size) if size else
            ctypes.create_string_buffer(1) for size in sizes]  # fmt: skip


def iovec(parts: list[Buffer], sizes: list[int] | None = None) -> ctypes.Array[IoVec]:
    """An iovec over the buffers, with their own sizes unless told otherwise."""
    lengths = [len(p) for p in parts] if sizes is None else sizes
    return (IoVec * len(parts))(
        *(
            IoVec(ctypes.addressof(part), length)
            for part, length in zip(parts, lengths, strict=True)
        )
    )


def message(vector: ctypes.Array[IoVec]) -> MsgHdr:
    return MsgHdr(iov=vector, iovlen=len(vector))


def timespec(seconds: float) -> Any:
    whole = int(seconds)
    return ctypes.byref(TimeSpec(whole, int((seconds - whole) * 1e9)))


BAD_POINTER = ctypes.c_void_p(8)
MSG_NOSIGNAL = socket.MSG_NOSIGNAL
EPOLLIN, EPOLLOUT = select.EPOLLIN, select.EPOLLOUT
EPOLLRDHUP, EPOLLHUP, EPOLLERR = select.EPOLLRDHUP, select.EPOLLHUP, select.EPOLLERR
EPOLLET, EPOLLONESHOT = select.EPOLLET & 0xFFFFFFFF, select.EPOLLONESHOT
EPOLLEXCLUSIVE = 1 << 28
POLLRDHUP = 0x2000


class Epoll:
    """An epoll set through libc, with 64-bit cookies of any value."""

    ADD, DEL, MOD = 1, 2, 3

    def __init__(self, flags: int = select.EPOLL_CLOEXEC) -> None:
        self.fd = ok("epoll_create1", flags)

    def ctl(self, op: int, fd: int, events: int, data: int) -> tuple[int, int]:
        event = EpollEvent(events & 0xFFFFFFFF, data)
        return c("epoll_ctl", self.fd, op, fd, ctypes.byref(event))

    def add(self, sock: HasFileno, events: int, data: int = 0) -> None:
        assert self.ctl(self.ADD, number(sock), events, data) == (0, 0)

    def mod(self, sock: HasFileno, events: int, data: int = 0) -> None:
        assert self.ctl(self.MOD, number(sock), events, data) == (0, 0)

    def remove(self, sock: HasFileno) -> None:
        assert self.ctl(self.DEL, number(sock), 0, 0) == (0, 0)

    def wait(self, timeout: int = PATIENCE_MS, most: int = 16) -> list[tuple[int, int]]:
        """(cookie, events) of what is ready, in the order given."""
        events = (EpollEvent * most)()
        count = ok("epoll_wait", self.fd, events, most, timeout)
        return [(events[i].data, events[i].events) for i in range(count)]

    def close(self) -> None:
        os.close(self.fd)


HasFileno = Any


def number(file: HasFileno) -> int:
    return file if isinstance(file, int) else int(file.fileno())


# --- waiting for a condition ----------------------------------------------------


def until(condition: Callable[[], T], what: str) -> T:
    """The first true value of condition; fails when there is none in time."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, f"in vain: {what}"
        time.sleep(0.0005)
    return value


def readable(sock: HasFileno) -> None:
    """Waits until there is something to read, or the end of the stream."""
    assert poll_one(sock, select.POLLIN), "nothing to read"


def poll_one(sock: HasFileno, events: int, timeout: int = PATIENCE_MS) -> int:
    poller = select.poll()
    poller.register(sock, events)
    found = poller.poll(timeout)
    return found[0][1] if found else 0


def _sleeping(path: str) -> bool:
    try:
        with open(path) as file:
            return file.read().rpartition(")")[2].split()[0] == "S"
    except OSError:
        return False


def until_asleep(pid: int, thread: int | None = None) -> None:
    """Waits until a thread that has nothing else to do is asleep in its call."""
    path = f"/proc/{pid}/task/{thread or pid}/stat"
    streak = 0

    def steady() -> bool:
        nonlocal streak
        streak = streak + 1 if _sleeping(path) else 0
        return streak >= 4

    until(steady, f"thread {thread or pid} of {pid} falls asleep")


class Task(Generic[T]):
    """A thread that runs one function; result() hands on what it returns or raises."""

    def __init__(self, function: Callable[..., T], *args: Any) -> None:
        self._value: T
        self._error: BaseException | None = None
        self._function, self._args = function, args
        self._begun = threading.Event()
        self.finished = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._begun.wait(PATIENCE)

    def _run(self) -> None:
        self._begun.set()
        try:
            self._value = self._function(*self._args)
        except BaseException as error:
            self._error = error
        finally:
            self.finished.set()

    @property
    def native_id(self) -> int:
        assert self._thread.native_id is not None
        return self._thread.native_id

    @property
    def ident(self) -> int:
        assert self._thread.ident is not None
        return self._thread.ident

    def until_asleep(self) -> Task[T]:
        until_asleep(os.getpid(), self.native_id)
        assert not self.finished.is_set(), f"returned early: {self._error!r}"
        return self

    def result(self) -> T:
        assert self.finished.wait(PATIENCE), "the thread did not come back"
        self._thread.join(PATIENCE)
        if self._error is not None:
            raise self._error
        return self._value


# --- ways to wait for bytes ------------------------------------------------------


def _by_recv(sock: socket.socket) -> bytes:
    return sock.recv(100)


def _by_poll(sock: socket.socket) -> bytes:
    assert poll_one(sock, select.POLLIN, -1) == select.POLLIN
    return sock.recv(100)


def _by_select(sock: socket.socket) -> bytes:
    assert select.select([sock], [], [])[0] == [sock]
    return sock.recv(100)


def _by_epoll(sock: socket.socket) -> bytes:
    epoll = Epoll()
    epoll.add(sock, EPOLLIN, 1)
    assert epoll.wait(-1) == [(1, EPOLLIN)]
    return sock.recv(100)


def _by_edge(sock: socket.socket) -> bytes:
    epoll = Epoll()
    epoll.add(sock, EPOLLIN | EPOLLET, 1)
    assert epoll.wait(-1) == [(1, EPOLLIN)]
    return sock.recv(100)


def _by_timeout(sock: socket.socket) -> bytes:
    sock.settimeout(8)
    try:
        return sock.recv(100)
    finally:
        sock.settimeout(None)


SLEEPS = (_by_recv, _by_poll, _by_select, _by_epoll, _by_edge, _by_timeout)


class Elapsed:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() - self._start


# --- bytes that can be checked anywhere in a stream -----------------------------

_PERIOD = 65521
_TILE = random.Random(1).randbytes(_PERIOD)
_STRIP = _TILE * 3


def pattern(length: int, start: int = 0) -> bytes:
    """Bytes start..start+length of an endless stream that is always the same."""
    offset = start % _PERIOD
    if length <= _PERIOD * 2:
        return _STRIP[offset : offset + length]
    whole = _TILE * (length // _PERIOD + 2)
    return whole[offset : offset + length]


def receive(sock: socket.socket, length: int) -> bytes:
    """Exactly length bytes."""
    parts = []
    while length:
        part = sock.recv(min(length, 1 << 20))
        assert part, f"the stream ended {length} bytes early"
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def receive_pattern(sock: socket.socket, length: int, start: int = 0) -> None:
    done = 0
    while done < length:
        part = sock.recv(min(length - done, 1 << 18))
        assert part, f"the stream ended {length - done} bytes early"
        assert part == pattern(len(part), start + done), f"wrong bytes near {done}"
        done += len(part)


def send_until_full(sock: socket.socket, chunk: int = 65536, start: int = 0) -> int:
    """Sends the pattern without blocking until there is no room; bytes sent.

    The kernel may acknowledge a little later, and then has room again: full is
    what refuses twice, with nothing in between for longer than an ACK is delayed.
    """
    sock.setblocking(False)
    sent, quiet = 0, False
    while True:
        try:
            sent += sock.send(pattern(chunk, start + sent))
            quiet = False
        except BlockingIOError:
            if quiet:
                return sent
            quiet = not poll_one(sock, select.POLLOUT, QUIET_MS)


# --- whether a connection is on its rings ---------------------------------------

_HEADER = struct.Struct("=QIIIIII16s")
_ROW = struct.Struct("=IIIIQiI")
_BYTES = struct.Struct("=QQQQ")
_MAGIC = 0x535441545350414D
_ROW_RING = 2


@dataclass(frozen=True)
class Row:
    """What the statistics say about one connection of this process."""

    state: int
    reason: int
    transport: int
    ring_rx: int
    ring_tx: int

    @property
    def upgraded(self) -> bool:
        return self.state == _ROW_RING


def memfds() -> Iterator[str]:
    """Paths of the statistics memfds that this process has open."""
    for name in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{name}"
        with contextlib.suppress(OSError):
            if os.readlink(path).startswith("/memfd:kmap-stats"):
                yield path


def row_of(sock: HasFileno) -> Row | None:
    inode = os.fstat(number(sock)).st_ino
    best = None
    for path in memfds():
        with open(path, "rb") as file:
            data = file.read()
        header = _HEADER.unpack_from(data)
        assert header[:2] == (_MAGIC, 1), "unknown statistics layout"
        for index in range(header[5]):
            offset = header[2] + index * header[3]
            state, _role, reason, transport, row_inode, _fd, _pid = _ROW.unpack_from(
                data, offset
            )
            if row_inode == inode and state:
                rx, tx, _, _ = _BYTES.unpack_from(data, offset + 96)
                row = Row(state, reason, transport, rx, tx)
                if best is None or state == _ROW_RING:
                    best = row
    return best


def on_ring(sock: HasFileno) -> bool:
    """Both directions of this end have carried bytes by ring."""
    row = row_of(sock)
    return bool(
        row
        and row.state == _ROW_RING
        and row.transport == int(os.environ.get(TRANSPORT_ENV, 0))
        and row.ring_rx
        and row.ring_tx
    )


def assert_on_ring(sock: HasFileno) -> None:
    """Under Kmap: this end is on its rings.  On the kernel it says nothing."""
    if UNDER_KMAP:
        assert on_ring(sock), f"not on a ring: {row_of(sock)}"


# --- pairs inside one process ---------------------------------------------------


@dataclass
class Pair:
    """The two ends of one connection; a connected, b accepted."""

    a: socket.socket
    b: socket.socket

    def __iter__(self) -> Iterator[socket.socket]:
        return iter((self.a, self.b))

    def close(self) -> None:
        self.a.close()
        self.b.close()


def listener(host: str = "127.0.0.1", backlog: int = 16) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind((host, 0))
    sock.listen(backlog)
    return sock


def no_delay(sock: socket.socket) -> socket.socket:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def connected(listening: socket.socket, host: str | None = None) -> Pair:
    """A connection through the listening socket, not upgraded yet."""
    name = listening.getsockname()
    target = host or name[0]
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    a = socket.socket(family, socket.SOCK_STREAM)
    a.connect((target, name[1]))
    b, _ = listening.accept()
    return Pair(no_delay(a), no_delay(b))


def ping_pong(a: socket.socket, b: socket.socket, rounds: int = ROUNDS) -> None:
    for turn in range(rounds):
        ball = bytes([turn & 0xFF])
        assert a.send(ball) == 1
        assert b.recv(1) == ball
        assert b.send(ball) == 1
        assert a.recv(1) == ball


def upgrade(pair: Pair) -> Pair:
    """Round trips until both directions are on rings (under Kmap)."""
    ping_pong(pair.a, pair.b)
    assert_on_ring(pair.a)
    assert_on_ring(pair.b)
    return pair


def pair(upgraded: bool = True, host: str = "127.0.0.1") -> Pair:
    """A connected pair; upgraded, unless told otherwise."""
    with listener(host) as listening:
        made = connected(listening)
    return upgrade(made) if upgraded else made


# --- pairs with the far end in another process ----------------------------------


class Far:
    """The far process: holds its end of the connection and does what it is told."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.sock: socket.socket
        self.kept: dict[str, Any] = {}

    def serve(self) -> None:
        while True:
            request = self.control.recv(1 << 20)
            if not request:
                return
            what, args = pickle.loads(request)
            try:
                function = getattr(self, what) if isinstance(what, str) else None
                value = function(*args) if function else what(self, *args)
                answer: tuple[bool, Any] = (True, value)
            except BaseException as error:
                answer = (False, error)
            self.control.send(pickle.dumps(answer))

    def pid(self) -> int:
        return os.getpid()

    def connect(self, address: Any) -> None:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.sock = no_delay(socket.socket(family, socket.SOCK_STREAM))
        self.sock.connect(address)

    def listen(self, host: str) -> Any:
        self.kept["listener"] = listener(host)
        return self.kept["listener"].getsockname()

    def accept(self) -> None:
        self.sock, _ = self.kept["listener"].accept()
        no_delay(self.sock)
        self.kept.pop("listener").close()

    def echo(self, count: int) -> None:
        """Sends back count bytes, each as it comes."""
        while count:
            data = self.sock.recv(count)
            assert data, "the stream ended early"
            self.sock.sendall(data)
            count -= len(data)

    def on_ring(self) -> bool:
        return on_ring(self.sock)

    def send(self, data: bytes) -> int:
        return self.sock.send(data)

    def recv(self, most: int) -> bytes:
        return self.sock.recv(most)

    def receive(self, length: int) -> bytes:
        return receive(self.sock, length)

    def send_pattern(self, length: int) -> None:
        self.sock.sendall(pattern(length))

    def receive_pattern(self, length: int) -> None:
        receive_pattern(self.sock, length)

    def shutdown(self, how: int) -> None:
        self.sock.shutdown(how)

    def linger(self, seconds: int) -> None:
        value = struct.pack("ii", 1, seconds)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, value)

    def close(self) -> None:
        self.sock.close()


class Peer:
    """This process's handle on a far process."""

    def __init__(self, *, spawned: bool = False) -> None:
        self._control, far = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC
        )
        self._control.settimeout(PATIENCE)
        if spawned:
            import subprocess

            self._popen = subprocess.Popen(
                [sys.executable, *runner_arguments("--far", str(far.fileno()))],
                pass_fds=[far.fileno()],
            )
            self.pid = self._popen.pid
        else:
            self.pid = os.fork()
            if self.pid == 0:
                code = 1
                try:
                    self._control.close()
                    Far(far).serve()
                    code = 0
                finally:
                    os._exit(code)
        far.close()
        self._alive = True

    def start(self, what: str | Callable[..., Any], *args: Any) -> None:
        self._control.send(pickle.dumps((what, args)))

    def result(self) -> Any:
        answer = self._control.recv(1 << 20)
        assert answer, "the far process is gone"
        fine, value = pickle.loads(answer)
        if not fine:
            raise value
        return value

    def call(self, what: str | Callable[..., Any], *args: Any) -> Any:
        self.start(what, *args)
        return self.result()

    def until_asleep(self) -> None:
        until_asleep(self.pid)

    def kill(self) -> None:
        """SIGKILL, and not back before the process is dead."""
        os.kill(self.pid, signal.SIGKILL)
        self._reap()

    def finish(self) -> None:
        """Ends the far process; its exit status must be 0."""
        self._control.close()
        if self._alive:
            assert self._reap() == 0

    def _reap(self) -> int:
        self._alive = False
        if hasattr(self, "_popen"):
            return self._popen.wait(PATIENCE)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def runner_arguments(*args: str) -> list[str]:
    """Arguments for the interpreter to run this suite's runner."""
    return [
        os.path.join(os.path.dirname(os.path.abspath(__file__)), "runner.py"),
        *args,
    ]


def far_upgrade(sock: socket.socket, peer: Peer) -> None:
    peer.start("echo", ROUNDS)
    for turn in range(ROUNDS):
        ball = bytes([turn & 0xFF])
        assert sock.send(ball) == 1
        assert sock.recv(1) == ball
    peer.result()
    if UNDER_KMAP:
        assert on_ring(sock), f"not on a ring: {row_of(sock)}"
        assert peer.call("on_ring"), "the far end is not on a ring"


def far_pair(
    upgraded: bool = True,
    *,
    far_accepts: bool = False,
    spawned: bool = False,
    host: str = "127.0.0.1",
) -> tuple[socket.socket, Peer]:
    """A connection whose far end is in a child process."""
    peer = Peer(spawned=spawned)
    if far_accepts:
        address = peer.call("listen", host)
        sock = socket.socket(
            socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM
        )
        sock.connect(address[:2])
        peer.call("accept")
    else:
        with listener(host) as listening:
            peer.start("connect", listening.getsockname()[:2])
            sock, _ = listening.accept()
            peer.result()
    no_delay(sock)
    if upgraded:
        far_upgrade(sock, peer)
    return sock, peer


# --- children of a case ---------------------------------------------------------


def forked(function: Callable[[], None]) -> int:
    """Runs function in a forked child, which then exits with 0; the child's pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    return pid


def reap(pid: int) -> None:
    """The child must have exited with 0."""
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, f"child status {status:#x}"


@functools.cache
def page_size() -> int:
    return os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def handler(signum: int, *, restart: bool) -> Iterator[list[int]]:
    """A handler with or without SA_RESTART; the list grows with each signal."""
    seen: list[int] = []
    before = signal.signal(signum, lambda number, _frame: seen.append(number))
    signal.siginterrupt(signum, not restart)
    try:
        yield seen
    finally:
        signal.signal(signum, before)


def expect(error: int, function: Callable[..., Any], *args: Any) -> None:
    """The call raises OSError with this number."""
    try:
        value = function(*args)
    except OSError as raised:
        names = errno.errorcode
        if raised.errno != error:
            got = names.get(raised.errno or 0)
            raise AssertionError(f"{got} and not {names[error]}") from raised
    else:
        raise AssertionError(f"returned {value!r} and not {errno.errorcode[error]}")
