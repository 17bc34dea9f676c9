# SPDX-License-Identifier: Apache-2.0
"""Level-triggered, edge-triggered and one-shot registrations of one connection."""

from __future__ import annotations

import socket

from tests.conformance.kit import (
    EPOLLERR,
    EPOLLET,
    EPOLLHUP,
    EPOLLIN,
    EPOLLONESHOT,
    EPOLLOUT,
    EPOLLRDHUP,
    Elapsed,
    Epoll,
    Task,
    assert_on_ring,
    connected,
    each,
    far_pair,
    listener,
    pair,
    pattern,
    ping_pong,
    poll_one,
    receive,
    receive_pattern,
    send_until_full,
    until,
    upgrade,
)

_ALL = EPOLLIN | EPOLLOUT | EPOLLRDHUP


def level_in() -> None:
    """Reported each time until all was read."""
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLIN, 7)
    assert epoll.wait(0) == []
    ends.a.sendall(b"abc")
    for _ in range(4):
        assert epoll.wait() == [(7, EPOLLIN)]
    assert ends.b.recv(2) == b"ab"
    assert epoll.wait() == [(7, EPOLLIN)]
    assert ends.b.recv(2) == b"c"
    assert epoll.wait(0) == []


def level_out() -> None:
    ends, epoll = pair(), Epoll()
    epoll.add(ends.a, EPOLLOUT, 7)
    for _ in range(3):
        assert epoll.wait() == [(7, EPOLLOUT)]
    sent = send_until_full(ends.a)
    assert epoll.wait(0) == []
    receive_pattern(ends.b, sent)
    for _ in range(3):
        assert epoll.wait() == [(7, EPOLLOUT)]


def level_in_and_out() -> None:
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, _ALL, 7)
    assert epoll.wait() == [(7, EPOLLOUT)]
    ends.a.sendall(b"x")
    poll_one(ends.b, 1)
    assert epoll.wait() == [(7, EPOLLIN | EPOLLOUT)]
    assert ends.b.recv(10) == b"x"
    assert epoll.wait() == [(7, EPOLLOUT)]


def level_end_of_stream() -> None:
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, _ALL, 7)
    ends.a.shutdown(socket.SHUT_WR)
    until(lambda: epoll.wait(0) == [(7, _ALL)], "the end")
    assert ends.b.recv(1) == b""
    assert epoll.wait() == [(7, _ALL)]
    ends.b.shutdown(socket.SHUT_WR)
    until(lambda: epoll.wait(0) == [(7, _ALL | EPOLLHUP)], "both ends")


def level_reset() -> None:
    import struct

    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLIN, 7)
    ends.a.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    ends.a.close()
    want = [(7, EPOLLIN | EPOLLERR | EPOLLHUP)]
    assert epoll.wait() == want
    assert epoll.wait() == want
    assert ends.b.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 104
    until(lambda: epoll.wait(0) == [(7, EPOLLIN | EPOLLHUP)], "no error any more")


def level_mod_changes_the_interest() -> None:
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLIN, 7)
    ends.a.sendall(b"x")
    assert epoll.wait() == [(7, EPOLLIN)]
    epoll.mod(ends.b, EPOLLOUT, 8)
    assert epoll.wait() == [(8, EPOLLOUT)]
    epoll.mod(ends.b, 0, 9)
    assert epoll.wait(0) == []
    epoll.mod(ends.b, EPOLLIN | EPOLLOUT, 10)
    assert epoll.wait() == [(10, EPOLLIN | EPOLLOUT)]


def no_interest_still_reports_hangup() -> None:
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, 0, 7)
    ends.a.sendall(b"x")
    ends.a.close()
    assert ends.b.recv(1) == b"x"
    ends.b.shutdown(socket.SHUT_WR)
    assert epoll.wait() == [(7, EPOLLHUP)]


def level_rdhup_alone() -> None:
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLRDHUP, 7)
    ends.a.sendall(b"data")
    assert epoll.wait(0) == []
    ends.a.shutdown(socket.SHUT_WR)
    assert epoll.wait() == [(7, EPOLLRDHUP)]


def edge_one_report_for_one_arrival() -> None:
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLIN | EPOLLET, 7)
    for turn in range(10):
        assert epoll.wait(0) == []
        ends.a.sendall(b"%d" % turn)
        assert epoll.wait() == [(7, EPOLLIN)]
        assert epoll.wait(0) == []
        if turn % 2:
            assert receive(ends.b, 2) == b"%d%d" % (turn - 1, turn)


def edge_new_data_after_unread_data() -> None:
    """Each arrival is an edge, read or not."""
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLIN | EPOLLET, 7)
    for _ in range(5):
        ends.a.sendall(b"x")
        assert epoll.wait() == [(7, EPOLLIN)]
        assert epoll.wait(0) == []
    assert receive(ends.b, 5) == b"xxxxx"
    assert epoll.wait(0) == []


def edge_a_part_read_is_no_edge() -> None:
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLIN | EPOLLET, 7)
    ends.a.sendall(b"abcdef")
    assert epoll.wait() == [(7, EPOLLIN)]
    assert ends.b.recv(3) == b"abc"
    assert epoll.wait(0) == []
    assert ends.b.recv(3) == b"def"
    assert epoll.wait(0) == []


def edge_full_mask() -> None:
    """An arrival reports all that is true now, room included."""
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, _ALL | EPOLLET, 7)
    assert epoll.wait() == [(7, EPOLLOUT)]
    assert epoll.wait(0) == []
    ends.a.sendall(b"x")
    assert epoll.wait() == [(7, EPOLLIN | EPOLLOUT)]
    assert epoll.wait(0) == []
    ends.a.shutdown(socket.SHUT_WR)
    assert epoll.wait() == [(7, _ALL)]
    assert epoll.wait(0) == []


def edge_add_on_a_ready_connection() -> None:
    """ADD reports at once what is ready, under EPOLLET too."""
    ends, epoll = pair(), Epoll()
    ends.a.sendall(b"x")
    poll_one(ends.b, 1)
    epoll.add(ends.b, EPOLLIN | EPOLLET, 7)
    assert epoll.wait() == [(7, EPOLLIN)]
    assert epoll.wait(0) == []


@each(0, EPOLLET)
def remove_and_add_on_a_ready_connection(edge: int) -> None:
    """DEL then ADD, Envoy's way of changing its interest, reports again."""
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLIN | edge, 1)
    ends.a.sendall(b"x")
    assert epoll.wait() == [(1, EPOLLIN)]
    for turn in range(2, 6):
        epoll.remove(ends.b)
        assert epoll.wait(0) == []
        events = EPOLLIN | (EPOLLOUT if turn % 2 else 0)
        epoll.add(ends.b, events | edge, turn)
        assert epoll.wait() == [(turn, events)]
    if edge:
        assert epoll.wait(0) == []


@each(0, EPOLLET)
def remove_and_add_while_data_comes(edge: int) -> None:
    ends, epoll = pair(), Epoll()
    for turn in range(20):
        epoll.add(ends.b, EPOLLIN | edge, turn)
        assert epoll.wait(0) == []
        ends.a.sendall(b"x")
        assert epoll.wait() == [(turn, EPOLLIN)]
        assert ends.b.recv(10) == b"x"
        epoll.remove(ends.b)
        ends.a.sendall(b"y")
        poll_one(ends.b, 1)
        assert epoll.wait(0) == []
        epoll.add(ends.b, EPOLLIN | edge, turn + 100)
        assert epoll.wait() == [(turn + 100, EPOLLIN)]
        assert ends.b.recv(10) == b"y"
        epoll.remove(ends.b)


def edge_mod_arms_again() -> None:
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLIN | EPOLLET, 7)
    ends.a.sendall(b"x")
    assert epoll.wait() == [(7, EPOLLIN)]
    assert epoll.wait(0) == []
    epoll.mod(ends.b, EPOLLIN | EPOLLET, 8)
    assert epoll.wait() == [(8, EPOLLIN)]
    assert epoll.wait(0) == []
    epoll.mod(ends.b, EPOLLIN | EPOLLOUT | EPOLLET, 9)
    assert epoll.wait() == [(9, EPOLLIN | EPOLLOUT)]
    assert epoll.wait(0) == []


def edge_out_when_room_comes() -> None:
    ends, epoll = pair(), Epoll()
    epoll.add(ends.a, EPOLLOUT | EPOLLET, 7)
    assert epoll.wait() == [(7, EPOLLOUT)]
    assert epoll.wait(0) == []
    at = 0
    for _ in range(4):
        sent = send_until_full(ends.a, 65536, at)
        assert epoll.wait(0) == []
        task = Task(epoll.wait).until_asleep()
        receive_pattern(ends.b, sent, at)
        at += sent
        assert task.result() == [(7, EPOLLOUT)]
        # The last of the bytes may have given a second edge.
        until(lambda: epoll.wait(0) == [], "no more edges")


def edge_no_report_for_writing() -> None:
    """What one sends, and what the peer reads while there is room, is no edge."""
    ends, epoll = pair(), Epoll()
    epoll.add(ends.a, EPOLLIN | EPOLLOUT | EPOLLET, 7)
    assert epoll.wait() == [(7, EPOLLOUT)]
    for _ in range(20):
        ends.a.sendall(b"x")
        assert ends.b.recv(10) == b"x"
        assert epoll.wait(0) == []


def edge_of_its_own_kind_only() -> None:
    """Data is no edge for who waits for room, and room none for who waits for data."""
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLOUT | EPOLLET, 7)
    assert epoll.wait() == [(7, EPOLLOUT)]
    ends.a.sendall(b"x")
    poll_one(ends.b, 1)
    assert epoll.wait(0) == []
    epoll.mod(ends.b, EPOLLIN | EPOLLET, 8)
    assert epoll.wait() == [(8, EPOLLIN)]
    sent = send_until_full(ends.b)
    receive_pattern(ends.a, sent)
    assert poll_one(ends.b, 4) == 4
    assert epoll.wait(0) == []


def edge_waits_for_enough() -> None:
    """SO_RCVLOWAT: too little is no edge, and setting it is none either."""
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLIN | EPOLLOUT | EPOLLET, 7)
    assert epoll.wait() == [(7, EPOLLOUT)]
    ends.b.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 10)
    ends.a.sendall(b"12345")
    assert epoll.wait(10) == []
    ends.a.sendall(b"67890")
    assert epoll.wait() == [(7, EPOLLIN | EPOLLOUT)]
    assert epoll.wait(0) == []


def edge_end_of_stream() -> None:
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLIN | EPOLLRDHUP | EPOLLET, 7)
    ends.a.sendall(b"x")
    assert epoll.wait() == [(7, EPOLLIN)]
    assert ends.b.recv(10) == b"x"
    ends.a.close()
    assert epoll.wait() == [(7, EPOLLIN | EPOLLRDHUP)]
    assert ends.b.recv(10) == b""
    assert epoll.wait(0) == []


def edge_data_and_end_at_once() -> None:
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLIN | EPOLLRDHUP | EPOLLET, 7)
    ends.a.sendall(b"x")
    ends.a.close()
    poll_one(ends.b, 0x2000)
    assert epoll.wait() == [(7, EPOLLIN | EPOLLRDHUP)]
    assert epoll.wait(0) == []
    assert ends.b.recv(10) == b"x"
    assert ends.b.recv(10) == b""


def edge_own_shutdown_then_the_peers() -> None:
    ends, epoll = pair(), Epoll()
    ends.b.shutdown(socket.SHUT_WR)
    epoll.add(ends.b, _ALL | EPOLLET, 7)
    assert epoll.wait() == [(7, EPOLLOUT)]
    ends.a.close()
    until(lambda: (7, _ALL | EPOLLHUP) in epoll.wait(0), "hang up")


def edge_wakes_for_each_arrival_across_processes() -> None:
    sock, peer = far_pair()
    epoll = Epoll()
    epoll.add(sock, EPOLLIN | EPOLLET, 7)
    for turn in range(5):
        task = Task(epoll.wait).until_asleep()
        peer.call("send", b"%d" % turn)
        assert task.result() == [(7, EPOLLIN)]
    assert receive(sock, 5) == b"01234"
    peer.finish()


def edge_read_until_empty_loses_nothing() -> None:
    """A reader that drains to EAGAIN at each edge sees all of a fast stream."""
    sock, peer = far_pair()
    sock.setblocking(False)
    epoll = Epoll()
    epoll.add(sock, EPOLLIN | EPOLLRDHUP | EPOLLET, 7)
    total = 8 << 20
    peer.start("send_pattern", total)
    at = 0
    while at < total:
        assert epoll.wait(), f"no edge after {at} bytes"
        while True:
            try:
                data = sock.recv(10000)
            except BlockingIOError:
                break
            assert data == pattern(len(data), at)
            at += len(data)
    peer.result()
    peer.finish()


def edge_write_until_full_loses_nothing() -> None:
    sock, peer = far_pair()
    sock.setblocking(False)
    epoll = Epoll()
    epoll.add(sock, EPOLLIN | EPOLLOUT | EPOLLET, 7)
    total = 8 << 20
    peer.start("receive_pattern", total)
    at = 0
    while at < total:
        assert epoll.wait(), f"no edge after {at} bytes"
        while at < total:
            try:
                at += sock.send(pattern(min(100000, total - at), at))
            except BlockingIOError:
                break
    peer.result()
    peer.finish()


def oneshot_reports_once() -> None:
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLIN | EPOLLONESHOT, 7)
    ends.a.sendall(b"x")
    assert epoll.wait() == [(7, EPOLLIN)]
    ends.a.sendall(b"y")
    assert epoll.wait(0) == []
    epoll.mod(ends.b, EPOLLIN | EPOLLONESHOT, 8)
    assert epoll.wait() == [(8, EPOLLIN)]
    assert epoll.wait(0) == []
    assert receive(ends.b, 2) == b"xy"
    epoll.mod(ends.b, EPOLLIN | EPOLLONESHOT, 9)
    assert epoll.wait(0) == []
    ends.a.sendall(b"z")
    assert epoll.wait() == [(9, EPOLLIN)]
    assert epoll.wait(0) == []


def oneshot_is_silent_about_the_end() -> None:
    """A spent registration reports nothing at all, not even a hang-up."""
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLIN | EPOLLONESHOT, 7)
    ends.a.sendall(b"x")
    assert epoll.wait() == [(7, EPOLLIN)]
    ends.a.close()
    poll_one(ends.b, 0x2000)
    assert epoll.wait(0) == []
    epoll.mod(ends.b, EPOLLIN | EPOLLRDHUP | EPOLLONESHOT, 8)
    assert epoll.wait() == [(8, EPOLLIN | EPOLLRDHUP)]


def oneshot_edge_triggered() -> None:
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLIN | EPOLLET | EPOLLONESHOT, 7)
    for turn in range(5):
        ends.a.sendall(b"x")
        assert epoll.wait() == [(7, EPOLLIN)]
        ends.a.sendall(b"x")
        assert epoll.wait(0) == []
        assert receive(ends.b, 2) == b"xx"
        epoll.mod(ends.b, EPOLLIN | EPOLLET | EPOLLONESHOT, 7)
        assert epoll.wait(0) == [], f"turn {turn}"


def oneshot_wakes_a_sleeper_after_mod() -> None:
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLIN | EPOLLONESHOT, 7)
    ends.a.sendall(b"x")
    assert epoll.wait() == [(7, EPOLLIN)]
    task = Task(epoll.wait).until_asleep()
    epoll.mod(ends.b, EPOLLIN | EPOLLONESHOT, 8)
    assert task.result() == [(8, EPOLLIN)]


def mod_wakes_a_sleeper() -> None:
    """Another thread widens the interest while this one sleeps in the set."""
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLIN, 7)
    task = Task(epoll.wait).until_asleep()
    epoll.mod(ends.b, EPOLLIN | EPOLLOUT, 8)
    assert task.result() == [(8, EPOLLOUT)]


def add_wakes_a_sleeper() -> None:
    ends, epoll = pair(), Epoll()
    ends.a.sendall(b"x")
    poll_one(ends.b, 1)
    task = Task(epoll.wait).until_asleep()
    epoll.add(ends.b, EPOLLIN, 7)
    assert task.result() == [(7, EPOLLIN)]


def add_wakes_a_sleeper_for_what_comes_later() -> None:
    ends, epoll = pair(), Epoll()
    task = Task(epoll.wait).until_asleep()
    epoll.add(ends.b, EPOLLIN, 7)
    task.until_asleep()
    ends.a.sendall(b"x")
    assert task.result() == [(7, EPOLLIN)]


@each(0, EPOLLET)
def registered_before_connect(edge: int) -> None:
    """Envoy's order: ADD, then connect; the registration follows the upgrade."""
    epoll = Epoll()
    with listener() as listening:
        a = socket.socket()
        a.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        a.setblocking(False)
        epoll.add(a, EPOLLIN | EPOLLOUT | EPOLLRDHUP | edge, 7)
        epoll.wait(0)  # an unconnected socket hangs up
        a.connect_ex(listening.getsockname())
        b, _ = listening.accept()
    until(lambda: epoll.wait(0) or poll_one(a, 4, 0), "connected")
    epoll.wait(0)
    a.setblocking(True)
    ping_pong(a, b)
    assert_on_ring(a)
    until(lambda: not edge or epoll.wait(0) == [], "old edges are gone")
    b.sendall(b"x")
    poll_one(a, 1)
    assert epoll.wait() == [(7, EPOLLIN | EPOLLOUT)]
    assert a.recv(10) == b"x"
    assert epoll.wait(0) == ([] if edge else [(7, EPOLLOUT)])
    b.close()
    until(lambda: (7, _ALL) in epoll.wait(0), "the end")


@each(0, EPOLLET)
def registered_before_the_upgrade(edge: int) -> None:
    with listener() as listening:
        ends = connected(listening)
    epoll = Epoll()
    epoll.add(ends.a, EPOLLIN | edge, 1)
    epoll.add(ends.b, EPOLLIN | edge, 2)
    for turn in range(64):
        ends.a.sendall(b"%d" % turn)
        assert epoll.wait() == [(2, EPOLLIN)], turn
        assert ends.b.recv(10) == b"%d" % turn
        assert epoll.wait(0) == [], turn
        ends.b.sendall(b"%d" % turn)
        assert epoll.wait() == [(1, EPOLLIN)], turn
        assert ends.a.recv(10) == b"%d" % turn
        assert epoll.wait(0) == [], turn
    assert_on_ring(ends.a)
    assert_on_ring(ends.b)


@each(0, EPOLLET)
def removed_before_the_upgrade(edge: int) -> None:
    """A registration that is gone stays gone."""
    with listener() as listening:
        ends = connected(listening)
    epoll = Epoll()
    epoll.add(ends.b, EPOLLIN | edge, 2)
    epoll.remove(ends.b)
    upgrade(ends)
    ends.a.sendall(b"x")
    poll_one(ends.b, 1)
    assert epoll.wait(0) == []
    assert epoll.ctl(epoll.MOD, ends.b.fileno(), EPOLLIN, 3) == (-1, 2)
    epoll.add(ends.b, EPOLLIN | edge, 3)
    assert epoll.wait() == [(3, EPOLLIN)]


def unread_data_across_the_upgrade() -> None:
    """Bytes that came by the kernel are reported, also when more come by ring."""
    with listener() as listening:
        ends = connected(listening)
    ends.b.sendall(b"early")
    epoll = Epoll()
    epoll.add(ends.a, EPOLLIN, 7)
    for turn in range(64):
        ends.a.sendall(b"%2d" % turn)
        assert receive(ends.b, 2) == b"%2d" % turn
        assert epoll.wait() == [(7, EPOLLIN)]
        ends.b.sendall(b"%2d" % turn)
    assert epoll.wait() == [(7, EPOLLIN)]
    want = b"early" + b"".join(b"%2d" % turn for turn in range(64))
    assert receive(ends.a, len(want)) == want
    assert epoll.wait(0) == []
    ping_pong(ends.a, ends.b, 8)
    assert_on_ring(ends.b)


@each(0, 1, 10, 40)
def timeout_is_not_early(timeout: int) -> None:
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLIN, 7)
    elapsed = Elapsed()
    assert epoll.wait(timeout) == []
    assert elapsed() >= timeout / 1000


def no_timeout_waits() -> None:
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLIN, 7)
    task = Task(epoll.wait, -1).until_asleep()
    ends.a.sendall(b"x")
    assert task.result() == [(7, EPOLLIN)]


@each("epoll_pwait", "epoll_pwait2")
def waits_with_a_mask(name: str) -> None:
    import ctypes

    from tests.conformance.kit import EpollEvent, Skip, libc, ok, timespec

    if not hasattr(libc, name):
        raise Skip(f"this libc has no {name}")
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLIN, 7)
    events = (EpollEvent * 4)()

    def wait(seconds: float) -> int:
        when = int(seconds * 1000)
        if name == "epoll_pwait2":
            return ok(name, epoll.fd, events, 4, timespec(seconds), None)
        return ok(name, epoll.fd, events, 4, when, ctypes.create_string_buffer(128))

    elapsed = Elapsed()
    assert wait(0.02) == 0
    assert elapsed() >= 0.0199
    task = Task(wait, 8.0).until_asleep()
    ends.a.sendall(b"x")
    assert task.result() == 1
    assert (events[0].data, events[0].events) == (7, EPOLLIN)
    assert wait(0) == 1


def closed_connection_leaves_the_set() -> None:
    """Closing the last number ends the registration; nothing is reported."""
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLIN, 7)
    ends.a.sendall(b"x")
    assert epoll.wait() == [(7, EPOLLIN)]
    ends.b.close()
    assert epoll.wait(0) == []
    again = pair()
    epoll.add(again.b, EPOLLIN, 8)
    again.a.sendall(b"x")
    assert epoll.wait() == [(8, EPOLLIN)]


def duplicate_keeps_the_registration() -> None:
    """The registration belongs to the open file: it outlives the first number."""
    import os

    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLIN, 7)
    copy = os.dup(ends.b.fileno())
    ends.b.close()
    ends.a.sendall(b"x")
    assert epoll.wait() == [(7, EPOLLIN)]
    os.close(copy)
    assert epoll.wait(0) == []


def priority_bit_is_not_set() -> None:
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, 2 | EPOLLIN, 7)  # EPOLLPRI
    ends.a.sendall(b"x")
    assert epoll.wait() == [(7, EPOLLIN)]
    assert ends.b.recv(1) == b"x"
    assert epoll.wait(0) == []


def normal_bits() -> None:
    """EPOLLRDNORM and EPOLLWRNORM are reported when asked for."""
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, 0x40 | 0x100, 7)
    assert epoll.wait() == [(7, 0x100)]
    ends.a.sendall(b"x")
    poll_one(ends.b, 1)
    assert epoll.wait() == [(7, 0x140)]
