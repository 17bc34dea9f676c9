# SPDX-License-Identifier: Apache-2.0
"""One end of a connection whose other end is disturbed: end.py JSON.

The two ends exchange bytes whose value depends on their position, so that a missing,
doubled or wrong byte is seen.  Each end notes in a shared page how far it has come,
which outlives it.  A survivor first makes a connection with itself, which has to work
all the time, and reports in the end what it met and whether anything is left behind.
"""

from __future__ import annotations

import array
import contextlib
import errno
import json
import mmap
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any

PERIOD = 16381 * 4
PID, SENT, TRIED, TAKEN, DONE, LOOPS, READY = range(7)
ROUNDS = 40
FLOOD = 600_000
CHUNK = 100_000
SO_TIMESTAMP = 29  # the socket module has no name for it
GONE = (errno.ECONNRESET, errno.EPIPE)


def _pattern(seed: int) -> bytes:
    block = array.array("I")
    for i in range(seed, seed + PERIOD // 4):
        block.append(i * 2654435761 & 0xFFFFFFFF)
    # Long enough for every call at any place.
    return block.tobytes() * 3


class Ended(Exception):
    """The other end is gone: "eof", or the name of an error."""


class Page:
    """Numbers that both ends and the test see."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, 4096)

    def __getitem__(self, index: int) -> int:
        return int(struct.unpack_from("=Q", self._map, index * 8)[0])

    def __setitem__(self, index: int, value: int) -> None:
        struct.pack_into("=Q", self._map, index * 8, value)


def _state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2][1:2].decode()
    except OSError:
        return ""


class Waiter:
    """Waits for one socket in one way; the control pipe is served meanwhile."""

    def __init__(self, shape: str, control: int, mine: Page) -> None:
        self.shape = shape
        self.control = control
        self.mine = mine
        self.pair: tuple[socket.socket, socket.socket] | None = None
        self.blocking = shape == "recv"
        self.epoll = select.epoll() if shape in ("epoll", "edge") else None
        if self.epoll and control >= 0:
            self.epoll.register(control, select.EPOLLIN)
        self.edges = 0

    def add(self, sock: socket.socket) -> None:
        sock.setblocking(self.blocking)
        if self.shape == "edge" and self.epoll:
            self.epoll.register(sock, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
        elif self.epoll:
            self.epoll.register(sock, select.EPOLLIN)

    def events(self, sock: socket.socket, event: int) -> None:
        if self.shape == "epoll" and self.epoll:
            self.epoll.modify(sock, event)

    def wait(self, sock: socket.socket, event: int, seconds: float = -1.0) -> None:
        """Until sock is ready, or something else was served."""
        self.mine[LOOPS] += 1
        found: list[int] = []
        if self.shape == "select":
            reading = [self.control] if self.control >= 0 else []
            writing: list[int] = []
            (reading if event == select.POLLIN else writing).append(sock.fileno())
            limit = None if seconds < 0 else seconds
            ready = select.select(reading, writing, [], limit)
            found = [self.control] if self.control in ready[0] else []
        elif self.shape == "poll":
            poll = select.poll()
            poll.register(sock, event)
            if self.control >= 0:
                poll.register(self.control, select.POLLIN)
            found = [fd for fd, _ in poll.poll(seconds * 1000)]
        elif self.epoll:
            self.events(sock, event)
            found = [fd for fd, _ in self.epoll.poll(seconds)]
        if self.control in found:
            self.serve()

    def serve(self) -> None:
        """The test asks whether this event loop still goes round."""
        line = os.read(self.control, 1)
        assert line == b"?"
        self.trade()
        os.write(self.control, b"!")

    def trade(self) -> None:
        """A round trip on the connection with itself."""
        if self.pair is None:
            return
        for source, target in (self.pair, self.pair[::-1]):
            text = b"all is well" * 20
            source.sendall(text)
            got = b""
            while len(got) < len(text):
                with contextlib.suppress(BlockingIOError):
                    part = target.recv(4096)
                    assert part
                    got += part
            assert got == text, "the other connection is broken"


class Stream:
    """The connection under test."""

    def __init__(
        self, plan: dict[str, Any], sock: socket.socket, waiter: Waiter, other: Page
    ) -> None:
        self.plan = plan
        self.sock = sock
        self.waiter = waiter
        self.mine = waiter.mine
        self.other = other
        ends = (_pattern(1), _pattern(77))
        connector = plan["role"] == "connector"
        self.out, self.come = ends if connector else ends[::-1]
        self.file = plan.get("file", -1)
        self.counts: dict[str, int] = {}
        self.errors = 0
        self.wrong = False

    def step(self, name: str) -> None:
        """Where a run on the kernel dies, which has no fault points."""
        count = self.counts[name] = self.counts.get(name, 0) + 1
        if self.plan.get("die") == f"{name}:{count}":
            os.kill(os.getpid(), signal.SIGKILL)

    def patient(self) -> None:
        """What is sent next is to find the other end asleep."""
        if not self.plan["patient"]:
            return
        deadline = time.monotonic() + 2
        while _state(self.other[PID]) not in ("S", "Z", "T", ""):
            if time.monotonic() > deadline:
                return
            os.sched_yield()

    def failed(self, error: OSError) -> None:
        if error.errno in GONE:
            raise Ended(errno.errorcode[error.errno])
        # A call that was made to fail tells the program so, and the next goes on.
        self.errors += 1
        if self.errors > 2:
            raise error

    def pause(self, event: int) -> None:
        try:
            self.waiter.wait(self.sock, event)
        except OSError as error:
            self.failed(error)

    def put(self, data: bytes, *, file: bool = False) -> int:
        if not file:
            return self.sock.send(data)
        return os.sendfile(
            self.sock.fileno(), self.file, self.mine[SENT] % PERIOD, len(data)
        )

    def send(self, size: int, *, file: bool = False) -> None:
        """Sends size bytes and notes how far it has come."""
        goal = self.mine[SENT] + size
        while self.mine[SENT] < goal:
            start = self.mine[SENT] % PERIOD
            data = self.out[start : start + goal - self.mine[SENT]]
            self.mine[TRIED] = self.mine[SENT] + len(data)
            self.step("send.before")
            try:
                self.mine[SENT] += self.put(data, file=file)
            except BlockingIOError:
                self.pause(select.POLLOUT)
            except OSError as error:
                self.failed(error)
            self.step("send.after")
        self.mine[TRIED] = self.mine[SENT]

    def take(self, most: int) -> int:
        """Takes up to most bytes, of which there is one at least."""
        while True:
            if not self.waiter.blocking and self.waiter.shape != "edge":
                self.pause(select.POLLIN)
            if self.plan.get("die", "").startswith("recv.late"):
                self.await_page(SENT, self.mine[TAKEN] + 1)
                self.step("recv.late")
            self.step("recv.before")
            try:
                data = self.sock.recv(most)
            except BlockingIOError:
                if self.waiter.shape == "edge":
                    self.pause(select.POLLIN)
                continue
            except OSError as error:
                self.failed(error)
                continue
            if not data:
                raise Ended("eof")
            start = self.mine[TAKEN] % PERIOD
            if data != self.come[start : start + len(data)]:
                self.wrong = True
                raise Ended("wrong")
            self.mine[TAKEN] += len(data)
            self.step("recv.after")
            return len(data)

    def receive(self, size: int) -> None:
        while size:
            size -= self.take(size)

    def to_the_end(self) -> str:
        """Takes what there is; what comes behind it."""
        try:
            while True:
                self.take(65536)
        except Ended as end:
            return str(end)

    def await_page(self, index: int, least: int) -> None:
        """Not by the connection: the other end has come so far, or is dead."""
        while self.other[index] < least and _state(self.other[PID]) not in ("Z", ""):
            os.sched_yield()

    def await_full(self) -> None:
        """The other end cannot send any more, and sleeps."""
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and not self.other[DONE]:
            before = self.other[SENT]
            if (
                self.other[TRIED] > before
                and _state(self.other[PID]) in ("S", "T")
                and self.other[SENT] == before
            ):
                return
            if _state(self.other[PID]) in ("Z", ""):
                return
            os.sched_yield()


def sizes() -> Iterator[int]:
    size = 7
    while True:
        yield size
        size = size * 37 % 4001


def talk(stream: Stream, rounds: int) -> None:
    first = stream.plan["role"] == "connector"
    for size, _ in zip(sizes(), range(rounds), strict=False):
        if first:
            stream.patient()
            stream.send(size)
        stream.receive(size)
        if not first:
            stream.patient()
            stream.send(size)


def flood(stream: Stream, *, file: bool = False) -> None:
    """The actor sends more than fits anywhere; its partner is slow at first."""
    talk(stream, 8)
    if stream.plan["actor"]:
        left = FLOOD
        while left:
            size = min(left, CHUNK)
            stream.send(size, file=file)
            left -= size
        stream.receive(1)
        return
    done = 0
    for _ in range(6):
        stream.await_full()
        done += stream.take(min(20000, FLOOD - done))
    stream.receive(FLOOD - done)
    stream.send(1)


def half(stream: Stream) -> None:
    """The actor ends its stream; its partner answers and closes."""
    talk(stream, ROUNDS)
    if stream.plan["actor"]:
        stream.step("shutdown.before")
        stream.sock.shutdown(socket.SHUT_WR)
        stream.step("shutdown.after")
        stream.mine[READY] = 1
        stream.receive(9000)
        return
    try:
        stream.take(1)
    except Ended as end:
        if end.args != ("eof",):
            raise
    if not stream.other[READY]:
        # It died rather than shut down.
        if _state(stream.other[PID]) != "T":
            stream.await_page(READY, 1)
        if not stream.other[READY]:
            raise Ended("eof")
    stream.step("answer.before")
    stream.send(9000)
    stream.step("answer.after")


def ready(stream: Stream) -> None:
    """The upgrade is made while the actor sends nothing, and so does not cut over.

    What the two tell each other meanwhile goes by the pages.
    """
    for i in range(1, 31):
        if stream.plan["actor"]:
            stream.receive(100)
            stream.mine[READY] = i
        else:
            stream.send(100)
            stream.await_page(READY, i)


def behind(stream: Stream) -> None:
    """The actor cuts over while its partner still has something in the kernel."""
    talk(stream, 1)
    if stream.plan["actor"]:
        stream.send(500)
        ready(stream)
        stream.send(3000)
    else:
        ready(stream)
        stream.await_page(SENT, stream.mine[TAKEN] + 3500)
        stream.step("late.before")
        stream.receive(3500)
    talk(stream, 5)


def taken(stream: Stream) -> None:
    """The actor closes before anybody has looked into its ring."""
    talk(stream, 2)
    ready(stream)
    if stream.plan["actor"]:
        stream.send(3000)
        return
    # Not before the other has closed.
    stream.await_page(DONE, 1)
    stream.receive(3000)


def leave(stream: Stream) -> None:
    """The actor needs the kernel while there is something unread."""
    talk(stream, ROUNDS)
    if stream.plan["actor"]:
        stream.await_page(SENT, stream.mine[TAKEN] + 5000)
        stream.step("option.before")
        try:
            stream.sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMP, 1)
        except OSError as error:
            stream.failed(error)
        stream.step("option.after")
        stream.receive(5000)
        stream.send(100)
    else:
        stream.send(5000)
        stream.step("handed.after")
        stream.receive(100)
    talk(stream, 5)


def family(stream: Stream) -> None:
    """The actor forks, and the one goes on that lives: the child rather than not."""
    talk(stream, ROUNDS)
    if stream.plan["actor"]:
        parent = os.getpid()
        stream.step("fork.before")
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                talk(stream, ROUNDS)
            else:
                assert status == 0, status
            return
        talk(stream, ROUNDS)
        stream.mine[DONE] = 1
        if os.getppid() != parent:
            stream.sock.close()
        os._exit(0)
    talk(stream, ROUNDS)


def quiet(stream: Stream) -> None:
    """Both wait for ever."""
    talk(stream, ROUNDS)
    stream.receive(1)


def full(stream: Stream, *, file: bool = False) -> None:
    """The actor sends for ever, and nobody reads."""
    talk(stream, ROUNDS)
    while stream.plan["actor"]:
        stream.send(CHUNK, file=file)
    signal.pause()


SCENARIOS = {
    "quiet": quiet,
    "full": full,
    "full-file": lambda stream: full(stream, file=True),
    "talk": lambda stream: talk(stream, ROUNDS),
    "behind": behind,
    "flood": flood,
    "file": lambda stream: flood(stream, file=True),
    "half": half,
    "taken": taken,
    "leave": leave,
    "family": family,
}


def open_files() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[name] = os.readlink(f"/proc/self/fd/{name}")
    return {fd: link for fd, link in found.items() if not link.startswith("/proc/")}


def kind(fd: str, link: str) -> str:
    """What a descriptor is; a socket by its family."""
    if not link.startswith("socket:") or not os.path.exists(f"/proc/self/fd/{fd}"):
        return link
    sock = socket.socket(fileno=int(fd))
    family = sock.family
    sock.detach()
    return "unix socket" if family == socket.AF_UNIX else link


def mappings() -> list[str]:
    with open("/proc/self/maps") as file:
        names = (line.split(None, 5)[5:] for line in file)
        return sorted(
            name[0].strip() for name in names if name and "memfd:kmap" in name[0]
        )


def statistics() -> dict[str, int]:
    """Upgrades, and connections that stay on the kernel for a reason."""
    for fd, link in open_files().items():
        if link.startswith("/memfd:kmap-stats"):
            (upgrades,) = struct.unpack("=Q", os.pread(int(fd), 8, 256))
            reasons = struct.unpack("=64Q", os.pread(int(fd), 512, 1024))
            return {"upgrades": upgrades, "reasons": sum(reasons)}
    return {"upgrades": 0, "reasons": 0}


def own_pair(waiter: Waiter) -> None:
    """A connection of this process with itself, moved to rings."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    waiter.pair = (near, far)
    for sock in waiter.pair:
        sock.setblocking(False)
        if waiter.epoll:
            waiter.epoll.register(sock, select.EPOLLIN | select.EPOLLET)
    for _ in range(20):
        waiter.trade()
    # What the library makes for the first wait of its kind stays.
    if waiter.blocking:
        far.setblocking(True)
        far.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 9000)
        )
        files = len(open_files())
        for _ in range(20):
            with contextlib.suppress(BlockingIOError):
                far.recv(1)
            # On the kernel there is nothing to wait for.
            if len(open_files()) > files or "LD_PRELOAD" not in os.environ:
                break
        far.setblocking(False)
    else:
        waiter.wait(far, select.POLLIN, 0.001)
    if waiter.shape == "epoll" and waiter.epoll:
        waiter.epoll.modify(far, select.EPOLLIN | select.EPOLLET)


def small(sock: socket.socket) -> socket.socket:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, 65536)
    return sock


def made(plan: dict[str, Any]) -> socket.socket:
    if plan["role"] == "acceptor":
        listener = socket.socket(fileno=plan["listener"])
        sock, _ = listener.accept()
        listener.close()
        return sock
    sock = small(socket.socket())
    sock.connect(("127.0.0.1", plan["port"]))
    return sock


def is_second(plan: dict[str, Any]) -> bool:
    """Whose close follows the other's."""
    actor = bool(plan["actor"])
    if plan["scenario"] in ("talk", "half"):
        # The one that talk is about closes first, the other has shut down.
        return actor is (plan["scenario"] == "half")
    if plan["scenario"] == "taken":
        return not actor
    return bool(plan["role"] == "acceptor")


def refused(stream: Stream) -> str:
    """What becomes of sending to an end that is gone."""
    for _ in range(50):
        try:
            stream.put(b"x")
        except BlockingIOError:
            stream.waiter.wait(stream.sock, select.POLLOUT)
        except OSError as error:
            return errno.errorcode[error.errno or 0]
    return "taken"


def main() -> None:
    plan = json.loads(sys.argv[1])
    mine, other = Page(plan["my_page"]), Page(plan["other_page"])
    waiter = Waiter(plan["shape"], plan.get("control", -1), mine)
    if plan["scenario"].endswith("file"):
        plan["file"] = os.memfd_create("file")
        os.write(plan["file"], _pattern(1 if plan["role"] == "connector" else 77))
    if plan.get("survivor"):
        own_pair(waiter)
    mine[PID] = os.getpid()
    if plan["role"] == "acceptor":
        before = open_files()
        before.pop(str(plan["listener"]))
    else:
        before = open_files()
    mapped = mappings()
    sock = made(plan)
    # What is sent is to be at the other end, and not to wait for an acknowledgement.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    waiter.add(sock)
    stream = Stream(plan, sock, waiter, other)
    while not stream.other[PID]:
        os.sched_yield()
    end, after = "", ""
    try:
        SCENARIOS[plan["scenario"]](stream)
        if is_second(plan):
            end = stream.to_the_end()
    except Ended as reason:
        end = str(reason)
    ended_at = time.monotonic_ns()
    if end and end != "wrong" and not stream.other[DONE]:
        if end != "eof":
            # An error is told once, and an end of file follows.
            stream.to_the_end()
        after = refused(stream)
    stream.step("close.before")
    sock.close()
    stream.step("close.after")
    mine[DONE] = 1
    if plan.get("survivor"):
        waiter.trade()
    report = {
        "end": end,
        "after": after,
        "wrong": stream.wrong,
        "errors": stream.errors,
        "ended_at": ended_at,
        **statistics(),
        "fds": [
            (fd, kind(fd, link))
            for fd, link in sorted(open_files().items() ^ before.items())
        ],
        "maps": [name for name in mappings() if name not in mapped]
        if not plan.get("survivor")
        else []
        if mappings() == mapped
        else [mapped, mappings()],
    }
    os.write(1, json.dumps(report).encode() + b"\n")
    # Until the test has looked at what is left.
    if plan.get("linger"):
        os.read(plan["control"], 1)


main()
