# SPDX-License-Identifier: Apache-2.0
"""A peer that lies: at worst its own connection is reset."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.hostile import liar as lies
from tests.hostile.liar import Liar, until
from tests.hostile.victims import Spawn, Victim

SHAPES = ("thread", "poll", "epoll")
ROLES = pytest.mark.parametrize(
    "connects", [True, False], ids=["victim-accepts", "victim-connects"]
)
BOTH = pytest.mark.parametrize("shape", SHAPES)


@pytest.fixture
def victim(
    request: pytest.FixtureRequest,
    spawn: Spawn,
    kmap_env: dict[str, str],
    tmp_path: Path,
) -> Victim:
    """In the shape that the test names, or with epoll."""
    callspec = getattr(request.node, "callspec", None)
    shape = callspec.params.get("shape", "epoll") if callspec else "epoll"
    return Victim(spawn, kmap_env, tmp_path, shape)


# -- lies in the segment


def _published_beyond(liar: Liar) -> None:
    liar.cut_over()
    liar.put(liar.tx, "wpos", 1 << 40)


def _published_backwards(liar: Liar) -> None:
    liar.cut_over()
    liar.write(b"honest")
    _taken(liar, 6)
    liar.put(liar.tx, "wpos", 3)


def _level_ends_in_the_past(liar: Liar) -> None:
    liar.cut_over()
    liar.write(b"honest")
    _taken(liar, 6)
    liar.put(liar.tx, "grow_at", 2)
    liar.put(liar.tx, "wpos", 12)


def _end_that_never_comes(liar: Liar) -> None:
    liar.cut_over()
    liar.put(liar.tx, "end", 77)
    liar.put(liar.tx, "pflags", CUT_AND_END)
    liar.tcp.sendall(b"by the kernel")


def _cut_in_the_past(liar: Liar) -> None:
    liar.cut_over(off_by=-1)
    liar.tcp.sendall(b"k")


def _bytes_beside_the_ring(liar: Liar) -> None:
    liar.cut_over()
    liar.write(b"honest")
    _taken(liar, 6)
    liar.tcp.sendall(b"by the kernel")


def _taken(liar: Liar, upto: int) -> None:
    until("the victim to have read", lambda: liar.get(liar.tx, "rpos") == upto)


def _taken_beyond(liar: Liar) -> None:
    liar.cut_over()
    liar.put(liar.rx, "rpos", 1 << 40)
    # The victim looks when its ring's first level is full.
    for _ in range(3):
        before = liar.get(liar.tx, "wpos")
        liar.write(b"x" * 8000)
        _taken(liar, before + 8000)


def _stopped_beyond(liar: Liar) -> None:
    liar.cut_over()
    liar.put(liar.rx, "stop", 1 << 40)
    liar.put(liar.rx, "left", 2)
    liar.write(b"x")


CUT_AND_END = lies.CUT | lies.END
LIES: tuple[Callable[[Liar], None], ...] = (
    _published_beyond,
    _published_backwards,
    _level_ends_in_the_past,
    _end_that_never_comes,
    _cut_in_the_past,
    _bytes_beside_the_ring,
    _taken_beyond,
    _stopped_beyond,
)


@ROLES
@BOTH
def test_lies(victim: Victim, connects: bool, shape: str) -> None:
    with victim.liar(connects=connects) as liar:
        liar.upgrade()
    assert victim.line().startswith("gone")
    victim.honest()
    descriptors, segments = victim.descriptors(), victim.segments()
    for number, lie in enumerate(LIES, 1):
        with victim.liar(connects=connects) as liar:
            liar.upgrade()
            lie(liar)
            victim.finds_out(liar, number, lie.__name__)
        victim.settled(descriptors, segments)


# -- lies in the rendezvous


def _directory() -> int:
    return os.open("/", os.O_RDONLY | os.O_DIRECTORY)


def _tty() -> int:
    return os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)


def _full() -> int:
    return os.open("/dev/full", os.O_RDWR)


def _epoll() -> int:
    epoll = select.epoll()
    return os.dup(epoll.fileno())


def _stream() -> int:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).detach()


SIZE = lies.HEADER + 2 * lies.AREA
STRANGE = (_directory, _tty, _full, _epoll, lambda: os.eventfd(0), _stream)
SEGMENTS: tuple[Callable[[], int], ...] = (
    lambda: lies.segment(seals=0),
    lambda: lies.segment(seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW),
    lambda: lies.segment(seals=lies.SEALS | fcntl.F_SEAL_WRITE),
    lambda: lies.memfd(SIZE - 4096, content=lies.segment_header()),
    lambda: lies.memfd(SIZE + 4096, content=lies.segment_header()),
    lambda: lies.memfd(0),
    lambda: lies.memfd(100, content=lies.segment_header()),
    lambda: lies.memfd(SIZE),
    lambda: lies.memfd(SIZE, content=lies.segment_header(ring_size=12345)),
    lambda: lies.memfd(SIZE, content=lies.segment_header(version=99)),
    *STRANGE,
)
BELLS: tuple[Callable[[], int], ...] = (
    lambda: lies.memfd(lies.BELL_SIZE, seals=0),
    lambda: lies.memfd(lies.BELL_SIZE - 1),
    lambda: lies.memfd(0),
    *STRANGE,
)


def _tried(liar: Liar, message: bytes, fds: Sequence[int]) -> None:
    """Sends it in the right place of the handshake; the fds are given away."""
    liar.meet()
    if liar.connects:
        _, got = liar.receive()
        for fd in got:
            os.close(fd)
    liar.send(message, fds)
    for fd in fds:
        os.close(fd)
    if liar.connects and len(got) == 3:
        # Nothing else makes the victim look at once.
        liar.ping(4)


def _by_the_kernel(victim: Victim, liar: Liar) -> None:
    liar.ping(60)
    victim.honest()


# What the victim says of a rendezvous that was not as it should be.
REFUSALS = ("peer-bad", "peer-version", "syscall-failed", "peer-cancelled")
Attempt = Callable[[Liar], tuple[bytes, list[int]]]


def _proper(liar: Liar) -> list[int]:
    own = [os.dup(fd) for fd in liar.own]
    return own if liar.connects else [lies.segment(), *own]


def _in_place_of(index: int, make: Callable[[], int]) -> Attempt:
    """The proper message with one descriptor exchanged."""

    def attempt(liar: Liar) -> tuple[bytes, list[int]]:
        fds = _proper(liar)
        os.close(fds[index])
        fds[index] = make()
        return liar.message(), fds

    return attempt


def _says(**words: int) -> Attempt:
    return lambda liar: (liar.message(**words), _proper(liar))


def _with_fds(change: Callable[[list[int]], list[int]]) -> Attempt:
    return lambda liar: (liar.message(), change(_proper(liar)))


def _attempts(*, connects: bool) -> list[Attempt]:
    bell = 0 if connects else 1
    return [
        *(_in_place_of(bell, make) for make in BELLS),
        *(_in_place_of(bell + 1, make) for make in STRANGE),
        *(_in_place_of(0, make) for make in (() if connects else SEGMENTS)),
        _says(magic=1),
        _says(version=lies.VERSION - 1),
        _says(kind=7),
        _says(kind=lies.HELLO if connects else lies.ACK),
        _says(slot=16384),
        _with_fds(lambda fds: []),
        _with_fds(lambda fds: fds[:-1]),
        _with_fds(lambda fds: [*fds, _directory()]),
        _with_fds(lambda fds: [*fds, *(os.dup(0) for _ in range(40))]),
        lambda liar: (liar.message()[:-1], _proper(liar)),
        lambda liar: (liar.message() + b"more", _proper(liar)),
        lambda liar: (b"x", []),
    ]


@ROLES
def test_refused_hellos(victim: Victim, connects: bool) -> None:
    with victim.liar(connects=connects) as liar:
        liar.upgrade()
    victim.line()
    descriptors, segments = victim.descriptors(), victim.segments()
    attempts = _attempts(connects=connects)
    before = sum(map(victim.reason, REFUSALS))
    for attempt in attempts:
        with victim.liar(connects=connects) as liar:
            _tried(liar, *attempt(liar))
            _by_the_kernel(victim, liar)
        assert victim.line() == "gone end"
        victim.settled(descriptors, segments)
    assert sum(map(victim.reason, REFUSALS)) - before == len(attempts)
    assert victim.counter("upgrades") == 2
    assert victim.counter("protocol_resets") == 0


@ROLES
def test_hellos_of_other_versions(victim: Victim, connects: bool) -> None:
    """Told apart from malformed ones, though a later version may look different."""
    attempts: list[Attempt] = [
        _says(version=lies.VERSION + 1),
        lambda liar: (liar.message(version=9) + b"more" * 100, _proper(liar)),
        lambda liar: (liar.message(version=9)[:8], []),
        lambda liar: (liar.message(version=9), [*_proper(liar), os.dup(0)]),
    ]
    for count, attempt in enumerate(attempts, 1):
        with victim.liar(connects=connects) as liar:
            _tried(liar, *attempt(liar))
            _by_the_kernel(victim, liar)
        assert victim.line() == "gone end"
        assert victim.reason("peer-version") == count
    assert victim.reason("peer-bad") == 0


@ROLES
def test_a_hello_that_never_completes(victim: Victim, connects: bool) -> None:
    descriptors = victim.descriptors()
    with (
        victim.liar(connects=connects) as silent,
        victim.liar(connects=connects) as absent,
    ):
        silent.meet()
        if connects:
            # Listens, and accepts nothing.
            absent.listen()
        _by_the_kernel(victim, silent)
        _by_the_kernel(victim, absent)
    assert {victim.line(), victim.line()} == {"gone end"}
    until("what was open", lambda: len(victim.descriptors()) <= len(descriptors) + 2)


def test_thousands_of_offers(victim: Victim) -> None:
    with victim.liar(connects=False) as liar:
        liar.meet()
        descriptors = len(victim.descriptors())
        refused = 0
        for _ in range(3000):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sock.setblocking(False)
            try:
                sock.connect(liar.name)
            except OSError:
                refused += 1
            sock.close()
        assert liar.hello is not None
        liar.hello.setblocking(False)
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while True:
                liar.hello.send(b"x" * 60)
        assert refused > 2000
        liar.ping(60)
        victim.honest()
        assert len(victim.descriptors()) <= descriptors
    assert victim.line() == "gone end"


# -- another user id

NOBODY, DAEMON = 65534, 1


def _as_user(uid: int, act: Callable[[], None]) -> int:
    """Runs act in a child of that user id; the descriptor whose close ends it."""
    done_read, done_write = os.pipe()
    stay_read, stay_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            os.close(stay_write)
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            act()
            os.write(done_write, b"done")
            os.read(stay_read, 1)
            status = 0
        os._exit(status)
    os.close(done_write)
    os.close(stay_read)
    assert os.read(done_read, 4) == b"done"
    os.close(done_read)
    return stay_write


def _is_refused_for_its_user(victim: Victim) -> None:
    """One connection stays on the kernel, and the log says once why."""
    victim.honest()
    assert victim.reason("peer-uid") == 1
    (line,) = victim.log_lines()
    assert "does not own the other end" in line


@pytest.mark.skipif(os.getuid() != 0, reason="needs root for two user ids")
@pytest.mark.parametrize("user", [0, DAEMON], ids=["root", "daemon"])
def test_a_squatter_on_the_name(
    spawn: Spawn, kmap_env: dict[str, str], tmp_path: Path, user: int
) -> None:
    victim = Victim(spawn, kmap_env, tmp_path, "epoll", user=user or None)
    with victim.liar(connects=True) as liar:

        def squat() -> None:
            liar.listen()

        stay = _as_user(NOBODY, squat)
        liar.ping(60)
        os.close(stay)
        _is_refused_for_its_user(victim)
    assert victim.line() == "gone end"
    assert victim.counter("upgrades") == 1


@pytest.mark.skipif(os.getuid() != 0, reason="needs root for two user ids")
@pytest.mark.parametrize("user", [0, DAEMON], ids=["root", "daemon"])
def test_an_intruder_on_the_offer(
    spawn: Spawn, kmap_env: dict[str, str], tmp_path: Path, user: int
) -> None:
    victim = Victim(spawn, kmap_env, tmp_path, "epoll", user=user or None)
    with victim.liar(connects=False) as liar:
        liar.ping(2)

        def intrude() -> None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sock.connect(liar.name)
            own = lies.bell()
            socket.send_fds(sock, [liar.message()], [lies.segment(), *own])
            liar.hello = sock

        stay = _as_user(NOBODY, intrude)
        liar.ping(60)
        os.close(stay)
        _is_refused_for_its_user(victim)
    assert victim.line() == "gone end"
    assert victim.counter("upgrades") == 1


# -- doorbells


def _answered(liar: Liar, data: bytes) -> None:
    """By the rings, both ways."""
    wanted = liar.get(liar.rx, "wpos") + len(data)
    liar.write(data)
    until("an answer", lambda: liar.get(liar.rx, "wpos") == wanted)
    liar.put(liar.rx, "rpos", wanted)


def _flood(victim: Victim, latch: socket.socket, counter: str, more: int) -> None:
    """Rings until that counter of the victim's has grown so much."""
    wanted = victim.counter(counter) + more

    def rung() -> bool:
        for _ in range(200):
            lies.ring(latch)
        return victim.counter(counter) >= wanted

    until(f"{counter} to grow by {more} in a flood", rung)


@BOTH
def test_a_flood_of_doorbells(victim: Victim, shape: str) -> None:
    with victim.liar(connects=True) as liar:
        liar.upgrade()
        liar.cut_over()
        assert liar.latch is not None
        cpu, began = victim.cpu_s(), time.monotonic()
        _flood(victim, liar.latch, "doorbell_floods", 1)
        found = time.monotonic()
        _flood(victim, liar.latch, "doorbell_sleeps", 150)
        elapsed = time.monotonic() - found
        # One thread hears the bell, and naps for a millisecond before each sleep.
        if shape != "thread":
            assert elapsed > 0.1
            assert victim.cpu_s() - cpu < (time.monotonic() - began) / 2
        victim.honest()
        # It is a delay, and nothing else: the liar's connection goes on too.
        _answered(liar, b"honest")
        assert len(victim.log_lines()) == 1
        # Nobody has a connection with the liar any more, and still it rings.
        latch = socket.socket(fileno=os.dup(liar.latch.fileno()))
    assert victim.line().startswith("gone")
    _flood(victim, latch, "doorbell_sleeps", 300)
    victim.honest()
    latch.close()


@BOTH
@ROLES
def test_nothing_makes_a_ring_block(victim: Victim, connects: bool, shape: str) -> None:
    with victim.liar(connects=connects) as liar:
        liar.upgrade()
        liar.cut_over()
        own = socket.socket(fileno=os.dup(liar.own[1]))
        own.setblocking(True)
        # Its queue is full, and it is connected to itself.
        with contextlib.suppress(OSError):
            own.bind(b"")
            own.connect(own.getsockname())
            own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            while True:
                own.send(b"x" * 100, socket.MSG_DONTWAIT)
        page = os.pread(liar.own[0], 136, 0)
        for turn in range(1, 100):
            # A sleeper that was not rung for yet.
            os.pwrite(liar.own[0], ((turn << 32) + 1).to_bytes(8, "little"), 128)
            _answered(liar, b"y")
        assert page[:8] != bytes(8)
        assert victim.counter("doorbells_rung") >= 99
        own.close()
        victim.honest()
