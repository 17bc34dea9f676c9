# SPDX-License-Identifier: Apache-2.0
"""The upgrade happens while something else is going on."""

from __future__ import annotations

import socket
from collections.abc import Callable

from tests.conformance.kit import (
    EPOLLET,
    EPOLLIN,
    ROUNDS,
    SLEEPS,
    UNDER_KMAP,
    Epoll,
    Pair,
    Task,
    assert_on_ring,
    connected,
    each,
    listener,
    on_ring,
    pair,
    pattern,
    ping_pong,
    receive,
    receive_pattern,
    row_of,
    send_until_full,
    until,
)


def _unlike() -> Pair:
    with listener() as listening:
        return connected(listening)


@each(*SLEEPS)
def sleeper_of_the_acceptor(sleep: Callable[[socket.socket], bytes]) -> None:
    """A thread sleeps on b while a keeps receiving from b: b's sleeper must wake.

    The traffic from b to a makes the connection hot, and the upgrade takes place
    under the sleeper; the first byte from a to b comes after it.
    """
    ends = _unlike()
    task = Task(sleep, ends.b).until_asleep()
    for turn in range(ROUNDS):
        ends.b.sendall(b"%2d" % turn)
        assert receive(ends.a, 2) == b"%2d" % turn
    ends.a.sendall(b"wake")
    assert _all_of(task.result(), ends.b, 4) == b"wake"
    ping_pong(ends.a, ends.b)
    assert_on_ring(ends.a)
    assert_on_ring(ends.b)


@each(*SLEEPS)
def sleeper_of_the_connector(sleep: Callable[[socket.socket], bytes]) -> None:
    ends = _unlike()
    task = Task(sleep, ends.a).until_asleep()
    for turn in range(ROUNDS):
        ends.a.sendall(b"%2d" % turn)
        assert receive(ends.b, 2) == b"%2d" % turn
    ends.b.sendall(b"wake")
    assert _all_of(task.result(), ends.a, 4) == b"wake"
    ping_pong(ends.a, ends.b)
    assert_on_ring(ends.a)
    assert_on_ring(ends.b)


def _all_of(first: bytes, sock: socket.socket, length: int) -> bytes:
    """The rest of a message that may have come in two reads."""
    return first + receive(sock, length - len(first))


@each(*SLEEPS)
def sleepers_at_both_ends(sleep: Callable[[socket.socket], bytes]) -> None:
    """Both ends sleep, then one writes, which is the first call it makes."""
    ends = _unlike()
    one, two = Task(sleep, ends.a).until_asleep(), Task(sleep, ends.b).until_asleep()
    ends.a.sendall(b"to b")
    assert _all_of(two.result(), ends.b, 4) == b"to b"
    ends.b.sendall(b"to a")
    assert _all_of(one.result(), ends.a, 4) == b"to a"
    ping_pong(ends.a, ends.b)
    assert_on_ring(ends.a)


@each(*SLEEPS)
def sleeper_wakes_for_the_end(sleep: Callable[[socket.socket], bytes]) -> None:
    """The upgrade under a sleeper, then the peer closes without a byte."""
    ends = _unlike()
    task = Task(sleep, ends.b).until_asleep()
    for turn in range(ROUNDS):
        ends.b.sendall(b"%2d" % turn)
        assert receive(ends.a, 2) == b"%2d" % turn
    ends.a.close()
    assert task.result() == b""


@each(0, EPOLLET)
def cookies_through_twenty_upgrades(edge: int) -> None:
    """A sleeper in epoll_wait never sees a cookie that is not the program's."""
    for turn in range(20):
        ends = _unlike()
        epoll = Epoll()
        epoll.add(ends.b, EPOLLIN | edge, turn)
        task = Task(epoll.wait).until_asleep()
        for _ in range(8):
            ends.b.sendall(b"x")
            assert ends.a.recv(1) == b"x"
        ends.a.sendall(b"x")
        assert task.result() == [(turn, EPOLLIN)]
        assert ends.b.recv(1) == b"x"
        ends.close()
        epoll.close()


def writer_asleep_during_the_upgrade() -> None:
    """A thread is asleep in send, full, while the other direction makes it hot."""
    ends = _unlike()
    sent = send_until_full(ends.a)
    ends.a.setblocking(True)
    task = Task(ends.a.sendall, pattern(1 << 20, sent)).until_asleep()
    for turn in range(ROUNDS):
        ends.b.sendall(b"%2d" % turn)
        assert receive(ends.a, 2) == b"%2d" % turn
    receive_pattern(ends.b, sent + (1 << 20))
    task.result()
    ping_pong(ends.a, ends.b)
    assert_on_ring(ends.a)
    assert_on_ring(ends.b)


def bytes_in_flight_at_the_cut() -> None:
    """Megabytes wait in the kernel when the ring begins; the order is kept."""
    ends = _unlike()
    sent = send_until_full(ends.a)
    ends.a.setblocking(True)
    for turn in range(ROUNDS):
        ends.b.sendall(b"%2d" % turn)
        assert receive(ends.a, 2) == b"%2d" % turn
    task = Task(ends.a.sendall, pattern(1 << 20, sent))
    receive_pattern(ends.b, sent + (1 << 20))
    task.result()


def streams_both_ways_from_the_start() -> None:
    """Both directions cut over in the middle of traffic, byte exact."""
    ends = _unlike()
    size = 4 << 20
    tasks = [
        Task(ends.a.sendall, pattern(size)),
        Task(receive_pattern, ends.b, size),
        Task(ends.b.sendall, pattern(size)),
        Task(receive_pattern, ends.a, size),
    ]
    for task in tasks:
        task.result()
    ping_pong(ends.a, ends.b)
    assert_on_ring(ends.a)
    assert_on_ring(ends.b)


def stream_one_way_is_upgraded() -> None:
    """A connection that never answers moves to a ring too."""
    ends = _unlike()
    most, step = 64 << 20, 16384

    def moved() -> bool:
        row = row_of(ends.b)
        return bool(row and row.ring_rx)

    for start in range(0, most if UNDER_KMAP else most // 16, step):
        ends.a.sendall(pattern(step, start))
        receive_pattern(ends.b, step, start)
        if UNDER_KMAP and moved():
            return
    assert not UNDER_KMAP, f"not on a ring: {row_of(ends.b)}"


def close_during_the_upgrade() -> None:
    """At each stage of the hand-shake one end goes away."""
    for calls in range(1, 30):
        ends = _unlike()
        for turn in range(calls):
            sender, receiver = (ends.a, ends.b) if turn % 2 == 0 else (ends.b, ends.a)
            sender.sendall(b"%2d" % turn)
            assert receive(receiver, 2) == b"%2d" % turn
        ends.b.sendall(b"last")
        ends.b.close()
        assert receive(ends.a, 4) == b"last"
        assert ends.a.recv(1) == b""
        ends.a.close()


def half_close_during_the_upgrade() -> None:
    for calls in range(1, 30):
        ends = _unlike()
        for turn in range(calls):
            sender, receiver = (ends.a, ends.b) if turn % 2 == 0 else (ends.b, ends.a)
            sender.sendall(b"%2d" % turn)
            assert receive(receiver, 2) == b"%2d" % turn
        ends.a.sendall(b"last")
        ends.a.shutdown(socket.SHUT_WR)
        assert receive(ends.b, 4) == b"last"
        assert ends.b.recv(1) == b""
        for turn in range(20):
            ends.b.sendall(b"%2d" % turn)
            assert receive(ends.a, 2) == b"%2d" % turn
        ends.b.close()
        assert ends.a.recv(1) == b""
        ends.a.close()


def epoll_across_the_upgrade_by_another_thread() -> None:
    """A sleeper in epoll_wait sees every message of a stream that cuts over."""
    ends = _unlike()
    epoll = Epoll()
    epoll.add(ends.b, EPOLLIN | EPOLLET, 1)
    ends.b.setblocking(False)
    total = 200 * 10

    def drain() -> bytes:
        got = b""
        while len(got) < total:
            assert epoll.wait() == [(1, EPOLLIN)]
            while True:
                try:
                    got += ends.b.recv(100)
                except BlockingIOError:
                    break
        return got

    task = Task(drain)
    for turn in range(200):
        ends.a.sendall(pattern(10, turn * 10))
        if turn % 3 == 0:
            ends.b.sendall(b"y")
            assert ends.a.recv(1) == b"y"
    assert task.result() == pattern(total)


def peek_before_the_upgrade() -> None:
    """Peeked bytes that came by the kernel are still there afterwards."""
    ends = _unlike()
    ends.a.sendall(b"GET /")
    assert ends.b.recv(5, socket.MSG_PEEK) == b"GET /"
    for _ in range(8):
        assert ends.b.recv(3, socket.MSG_PEEK) == b"GET"
    ends.a.sendall(b" more")
    until(lambda: len(ends.b.recv(100, socket.MSG_PEEK)) == 10, "all of it")
    assert receive(ends.b, 10) == b"GET / more"
    ping_pong(ends.a, ends.b)
    assert_on_ring(ends.b)


def _until_peeked(sock: socket.socket, data: bytes) -> None:
    until(
        lambda: sock.recv(len(data) + 1, socket.MSG_PEEK) == data,
        f"all {len(data)} bytes at once",
    )


def peek_across_the_cut() -> None:
    """One peek whose first bytes came by the kernel and whose last came by ring."""
    ends = _unlike()
    for start in range(0, 3000, 100):
        ends.a.sendall(pattern(100, start))
        ends.b.sendall(b"y")
        assert receive(ends.a, 1) == b"y"
        _until_peeked(ends.b, pattern(start + 100))
    assert receive(ends.b, 3000) == pattern(3000)
    ping_pong(ends.a, ends.b)
    assert_on_ring(ends.b)


def peek_across_the_end() -> None:
    """One peek whose first bytes came by ring and whose last came by the kernel."""
    ends = pair()
    ends.a.sendall(b"ring,")
    ends.b.shutdown(socket.SHUT_WR)
    assert ends.a.recv(1) == b""
    ends.a.sendall(b"kernel")
    _until_peeked(ends.b, b"ring,kernel")
    assert receive(ends.b, 11) == b"ring,kernel"


def waitall_across_the_cut() -> None:
    """One recv whose first bytes came by the kernel and whose last come by ring."""
    ends = _unlike()
    task = Task(ends.b.recv, 3000, socket.MSG_WAITALL)
    for start in range(0, 3000, 100):
        ends.a.sendall(pattern(100, start))
        ends.b.sendall(b"y")
        assert ends.a.recv(1) == b"y"
    assert task.result() == pattern(3000)


def many_connections_at_once() -> None:
    """Thirty connections are opened, used and upgraded side by side."""
    with listener(backlog=64) as listening:
        many = [connected(listening) for _ in range(30)]
    for turn in range(ROUNDS):
        for ends in many:
            ends.a.sendall(b"%2d" % turn)
        for ends in many:
            assert receive(ends.b, 2) == b"%2d" % turn
            ends.b.sendall(b"%2d" % turn)
        for ends in many:
            assert receive(ends.a, 2) == b"%2d" % turn
    if UNDER_KMAP:
        assert all(on_ring(ends.a) and on_ring(ends.b) for ends in many)


def no_delay_for_the_first_message() -> None:
    """A message that is written before the peer's first call is there for it."""
    with listener() as listening:
        for _ in range(20):
            a = socket.create_connection(listening.getsockname())
            a.sendall(b"hello")
            b, _ = listening.accept()
            assert b.recv(10) == b"hello"
            a.close()
            assert b.recv(10) == b""
            b.close()


def pair_says_so() -> None:
    """The helper of all other cases: pair really is on its rings, or really is not."""
    ends = pair()
    assert on_ring(ends.a) is on_ring(ends.b) is UNDER_KMAP
    fresh = _unlike()
    assert not on_ring(fresh.a)


def sends_of_nothing() -> None:
    """A send of nothing returns and moves nothing.

    Each end makes one before each of its others, so that one is the first call after
    the handshake.
    """
    ends = _unlike()
    for turn in range(ROUNDS):
        ball = bytes([turn])
        for sender, receiver in ((ends.a, ends.b), (ends.b, ends.a)):
            assert sender.send(b"") == 0
            assert sender.send(ball) == 1
            assert receiver.recv(2) == ball
    assert_on_ring(ends.a)
    assert_on_ring(ends.b)
