# SPDX-License-Identifier: Apache-2.0
"""A peer that lies about the pipes of transport pipe."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hostile import liar as lies
from tests.hostile.liar import Liar, until
from tests.hostile.victims import Spawn, Victim

ROLES = pytest.mark.parametrize(
    "connects", [True, False], ids=["victim-accepts", "victim-connects"]
)
# As the victim asks for it with its KMAP_RING_SIZE.
RING_SIZE = 65536


def _segment(ring_size: int = RING_SIZE) -> int:
    header = lies.segment_header(ring_size=ring_size)
    return lies.memfd(lies.HEADER, content=header)


def _pipe(size: int = 2 * RING_SIZE) -> int:
    """One of its ends, which the other side can open for both."""
    read, write = os.pipe2(os.O_NONBLOCK)
    fcntl.fcntl(read, fcntl.F_SETPIPE_SZ, size)
    os.close(write)
    return read


def _own(fd: int) -> int:
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_NONBLOCK)


class PipeLiar(Liar):
    """One whose bytes are in pipes."""

    transport = lies.PIPE

    def __init__(self, tcp: socket.socket, *, connects: bool) -> None:
        super().__init__(tcp, connects=connects)
        self.pipes: list[int] = []
        self.theirs: list[int] = []

    def close(self) -> None:
        super().close()
        for fd in (*self.pipes, *self.theirs):
            os.close(fd)

    def offered(self) -> list[int]:
        self.theirs = [_pipe(), _pipe()]
        self.pipes = [_own(fd) for fd in self.theirs]
        return [_segment(), *self.theirs]

    def came(self, fds: list[int]) -> None:
        assert len(fds) == 2
        self.theirs = fds
        self.pipes = [_own(fd) for fd in fds]

    def take(self, upto: int) -> None:
        count = upto - self.get(self.rx, "rpos")
        while count > 0:
            count -= len(os.read(self.pipes[self.rx], count))
        super().take(upto)

    def write(self, data: bytes) -> None:
        assert os.write(self.pipes[self.tx], data) == len(data)
        self.put(self.tx, "wpos", self.get(self.tx, "wpos") + len(data))
        self.nudge()

    def fill(self, ring: int) -> None:
        """Junk, until the pipe takes no more."""
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(self.pipes[ring], bytes(65536))


@pytest.fixture
def victim(spawn: Spawn, kmap_env: dict[str, str], tmp_path: Path) -> Victim:
    return Victim(spawn, {**kmap_env, "KMAP_TRANSPORT": "pipe"}, tmp_path, "epoll")


@contextlib.contextmanager
def _liar(victim: Victim, *, connects: bool) -> Iterator[PipeLiar]:
    with victim.connection(connects=connects) as tcp:
        liar = PipeLiar(tcp, connects=connects)
        try:
            yield liar
        finally:
            liar.close()


# -- lies about bytes


def _published_and_not_there(liar: PipeLiar) -> None:
    liar.put(liar.tx, "wpos", 100)


def _taken_back(liar: PipeLiar) -> None:
    assert os.write(liar.pipes[liar.tx], b"x" * 100) == 100
    assert len(os.read(liar.pipes[liar.tx], 60)) == 60
    liar.put(liar.tx, "wpos", 100)


def _published_beyond(liar: PipeLiar) -> None:
    liar.put(liar.tx, "wpos", RING_SIZE + 1)


def _filled(liar: PipeLiar) -> None:
    """The victim's answer finds no room, though the positions say that all is free."""
    liar.fill(liar.rx)
    liar.write(b"honest")


def _made_small(liar: PipeLiar) -> None:
    fcntl.fcntl(liar.pipes[liar.rx], fcntl.F_SETPIPE_SZ, 4096)
    liar.write(b"x" * 30000)


def _packets(liar: PipeLiar) -> None:
    """What is not read of a packet is thrown away."""
    flags = fcntl.fcntl(liar.pipes[liar.tx], fcntl.F_GETFL)
    fcntl.fcntl(liar.pipes[liar.tx], fcntl.F_SETFL, flags | os.O_DIRECT)
    assert os.write(liar.pipes[liar.tx], b"x" * 100) == 100
    # The victim reads what is published, and the rest of the packet is gone.
    liar.put(liar.tx, "wpos", 40)
    liar.nudge()
    until("the beginning to be read", lambda: liar.get(liar.tx, "rpos") == 40)
    liar.put(liar.tx, "wpos", 100)


LIES: tuple[Callable[[PipeLiar], None], ...] = (
    _published_and_not_there,
    _taken_back,
    _published_beyond,
    _filled,
    _made_small,
    _packets,
)


@ROLES
def test_lies(victim: Victim, connects: bool) -> None:
    with _liar(victim, connects=connects) as liar:
        liar.upgrade()
        liar.cut_over()
        # Nothing that was sent is shared, so that no call of the victim's can block.
        for fd in liar.theirs:
            fcntl.fcntl(fd, fcntl.F_SETFL, 0)
        liar.write(b"honest")
        wanted = liar.get(liar.rx, "rpos") + 6
        until("an answer", lambda: liar.get(liar.rx, "wpos") == wanted)
        liar.take(wanted)
    assert victim.line().startswith("gone")
    victim.honest()
    descriptors, segments = victim.descriptors(), victim.segments()
    for number, lie in enumerate(LIES, 1):
        with _liar(victim, connects=connects) as liar:
            liar.upgrade()
            liar.cut_over()
            for fd in liar.theirs:
                fcntl.fcntl(fd, fcntl.F_SETFL, 0)
            lie(liar)
            victim.finds_out(liar, number, lie.__name__)
        victim.settled(descriptors, segments)


# -- lies in the hello


def _directory() -> int:
    return os.open("/", os.O_RDONLY | os.O_DIRECTORY)


def _tty() -> int:
    return os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)


def _socket() -> int:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).detach()


STRANGE = (
    _directory,
    _tty,
    _socket,
    lambda: os.open("/dev/full", os.O_RDWR),
    lambda: os.open("/dev/zero", os.O_RDWR),
    lambda: os.eventfd(0),
    lambda: lies.memfd(65536),
    # A pipe indeed, and too small for what the segment says.
    lambda: _pipe(4096),
    lambda: _pipe(RING_SIZE),
)
SEGMENTS = (
    lies.segment,
    lambda: _segment(ring_size=0),
    lambda: _segment(ring_size=4095),
    lambda: _segment(ring_size=1 << 30),
    lambda: _segment(ring_size=4 * RING_SIZE),
)


def test_refused_hellos(victim: Victim) -> None:
    with _liar(victim, connects=False) as liar:
        liar.upgrade()
    victim.line()
    descriptors, segments = victim.descriptors(), victim.segments()
    attempts: list[Callable[[], list[int]]] = [
        *(lambda make=make: [_segment(), make(), _pipe()] for make in STRANGE),
        *(lambda make=make: [_segment(), _pipe(), make()] for make in STRANGE),
        *(lambda make=make: [make(), _pipe(), _pipe()] for make in SEGMENTS),
        lambda: [_segment()],
        lambda: [_segment(), _pipe()],
        lambda: [_segment(), _pipe(), _pipe(), _pipe()],
    ]
    for number, attempt in enumerate(attempts, 1):
        with _liar(victim, connects=False) as liar:
            liar.meet()
            fd, *more = attempt()
            liar.send(liar.message(), [fd, *liar.own, *more])
            for one in (fd, *more):
                os.close(one)
            liar.ping(60)
            victim.honest()
        assert victim.line() == "gone end"
        victim.settled(descriptors, segments)
        assert victim.reason("peer-bad") == number
    assert victim.counter("upgrades") == 2
    assert victim.counter("protocol_resets") == 0


@pytest.mark.parametrize("other", [lies.SHM, lies.FIFO, 3, 2**32 - 1])
def test_another_transport(victim: Victim, other: int) -> None:
    with _liar(victim, connects=False) as liar:
        liar.meet()
        fd, *more = liar.offered()
        liar.send(liar.message(transport=other), [fd, *liar.own, *more])
        os.close(fd)
        liar.ping(60)
        victim.honest()
    assert victim.line() == "gone end"
    assert victim.reason("transport") == 1
    assert victim.counter("upgrades") == 1
