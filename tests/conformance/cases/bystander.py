# SPDX-License-Identifier: Apache-2.0
"""Programs that upgrade nothing, and programs that Kmap is told to leave alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from tests.conformance.kit import (
    ROUNDS,
    UNDER_KMAP,
    Epoll,
    Peer,
    far_upgrade,
    forked,
    listener,
    memfds,
    on_ring,
    pair,
    ping_pong,
    reap,
    receive,
    row_of,
    settings,
)


def _numbers() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _maps() -> list[str]:
    with open("/proc/self/maps") as file:
        return [line for line in file if "memfd:kmap" in line]


def nothing_without_an_upgrade() -> None:
    """No descriptor, no thread, no mapping, whatever else the program does."""
    before = _numbers()
    one, two = socket.socketpair()
    ping_pong(one, two, 20)
    with listener() as listening:
        epoll = Epoll()
        epoll.add(listening, 1, 1)
        epoll.wait(0)
        epoll.close()
    one.close()
    two.close()
    reading, writing = os.pipe()
    os.write(writing, b"x")
    os.read(reading, 1)
    os.close(reading)
    os.close(writing)
    assert subprocess.run(["/bin/true"], check=False).returncode == 0
    reap(forked(lambda: None))
    assert _numbers() == before
    assert _threads() == 1
    assert _maps() == []


def no_thread_with_an_upgrade() -> None:
    ends = pair()
    ping_pong(ends.a, ends.b, 10)
    assert _threads() == 1


@settings(KMAP_DISABLE="1")
def switched_off() -> None:
    """KMAP_DISABLE=1: all calls are the kernel's; the memfd is not even there."""
    before = _numbers()
    ends = pair(upgraded=False)
    ping_pong(ends.a, ends.b)
    ping_pong(ends.a, ends.b)
    assert not on_ring(ends.a)
    assert list(memfds()) == []
    ends.close()
    assert _numbers() == before
    assert _maps() == []


def _without(far_accepts: bool) -> None:
    """The far process runs without Kmap; the connection stays on the kernel."""
    code = (
        "import socket, sys\n"
        "if sys.argv[1] == 'connect':\n"
        "    sock = socket.create_connection(('127.0.0.1', int(sys.argv[2])))\n"
        "else:\n"
        "    listening = socket.socket(fileno=int(sys.argv[2]))\n"
        "    sock = listening.accept()[0]\n"
        "while data := sock.recv(100):\n"
        "    sock.sendall(data)\n"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD",)}
    with listener() as listening:
        number = listening.fileno() if far_accepts else listening.getsockname()[1]
        child = subprocess.Popen(
            [sys.executable, "-S", "-c", code, "accept" if far_accepts else "connect",
             str(number)],
            env=env,
            pass_fds=[listening.fileno()] if far_accepts else [],
        )  # fmt: skip
        if far_accepts:
            sock = socket.create_connection(listening.getsockname())
        else:
            sock, _ = listening.accept()
    for turn in range(2 * ROUNDS):
        sock.sendall(b"%3d" % turn)
        assert receive(sock, 3) == b"%3d" % turn
    assert not on_ring(sock)
    sock.close()
    assert child.wait(8) == 0


def peer_without_kmap_connects() -> None:
    _without(False)


def peer_without_kmap_accepts() -> None:
    _without(True)


@settings(KMAP_UPGRADE_AFTER="100000")
def cold_connection_stays() -> None:
    """A connection that is used once is not offered; the program sees no number."""
    before = _numbers()
    with listener() as listening:
        a = socket.create_connection(listening.getsockname())
        b, _ = listening.accept()
    a.sendall(b"request")
    assert b.recv(100) == b"request"
    b.close()
    assert a.recv(1) == b""
    a.close()
    assert _numbers() == before


@settings(KMAP_RING_SIZE="4096")
def smallest_ring() -> None:
    """The smallest rings carry what the largest do."""
    from tests.conformance.kit import Task, pattern, receive_pattern

    ends = pair()
    task = Task(receive_pattern, ends.b, 1 << 20)
    ends.a.sendall(pattern(1 << 20))
    task.result()


@settings(KMAP_MEMORY_LIMIT="1")
def no_memory_budget() -> None:
    """At the budget the answer is the kernel."""
    ends = pair(upgraded=False)
    ping_pong(ends.a, ends.b)
    assert not on_ring(ends.a)


@settings(KMAP_UPGRADE_AFTER="nonsense")
def setting_that_makes_no_sense() -> None:
    """One line on standard error at most; the program runs."""
    ends = pair(upgraded=False)
    ping_pong(ends.a, ends.b)


def statistics_are_there_for_tools() -> None:
    """The memfd is named, has this process's connections, and only after an upgrade."""
    assert list(memfds()) == []
    ends = pair()
    assert len(list(memfds())) == int(UNDER_KMAP)
    if UNDER_KMAP:
        row = row_of(ends.a)
        assert row
        assert row.reason == 0
        assert row.ring_tx >= 1


def two_programs_of_different_settings() -> None:
    """A far process that was switched off: the kernel carries the bytes."""
    os.environ["KMAP_DISABLE"] = "1"
    peer = Peer(spawned=True)
    del os.environ["KMAP_DISABLE"]
    with listener() as listening:
        peer.start("connect", listening.getsockname())
        sock, _ = listening.accept()
        peer.result()
    peer.start("echo", 2 * ROUNDS)
    for _ in range(2 * ROUNDS):
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
    peer.result()
    assert not on_ring(sock)
    peer.finish()


def spawned_far_end_upgrades() -> None:
    """Two programs that share nothing but the library."""
    peer = Peer(spawned=True)
    with listener() as listening:
        peer.start("connect", listening.getsockname())
        sock, _ = listening.accept()
        peer.result()
    far_upgrade(sock, peer)
    peer.finish()


@settings(KMAP_LOG="debug:/dev/null")
def log_of_a_program_that_closes_everything() -> None:
    """The program's own files get its numbers, and none of the log's lines."""
    os.closerange(3, 2048)
    mine = os.memfd_create("mine")
    taken = [os.dup2(mine, number) for number in range(256, 1024)]
    ends = pair()
    ends.close()
    assert os.fstat(mine).st_size == 0
    for number in taken:
        os.close(number)
