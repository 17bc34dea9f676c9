# SPDX-License-Identifier: Apache-2.0
"""Many connections, many kinds of files, many threads and many sets."""

from __future__ import annotations

import os
import random
import select
import socket
from collections.abc import Callable
from functools import partial
from operator import eq

from tests.conformance.kit import (
    EPOLLET,
    EPOLLEXCLUSIVE,
    EPOLLIN,
    EPOLLONESHOT,
    EPOLLOUT,
    EPOLLRDHUP,
    Epoll,
    Pair,
    Task,
    connected,
    each,
    far_pair,
    forked,
    listener,
    ok,
    pair,
    poll_one,
    readable,
    reap,
    receive,
    until,
    upgrade,
)

_COOKIES = (0, 1, 2**64 - 1, 2**63, 2**32, 0xFFFFFFFF, 0x8000000000000001)


def cookies_of_every_value() -> None:
    """What the program registered is what it gets, for both kinds of files."""
    rng = random.Random(5)
    ends = pair()
    reading, writing = os.pipe()
    for cookie in (*_COOKIES, *(rng.getrandbits(64) for _ in range(200))):
        epoll = Epoll()
        other = rng.choice((cookie, cookie ^ 1, rng.getrandbits(64)))
        epoll.add(ends.b, EPOLLIN, cookie)
        epoll.add(reading, EPOLLIN, other)
        ends.a.sendall(b"x")
        assert epoll.wait() == [(cookie, EPOLLIN)]
        os.write(writing, b"x")
        assert sorted(epoll.wait()) == sorted([(cookie, EPOLLIN), (other, EPOLLIN)])
        assert ends.b.recv(1) == b"x"
        assert epoll.wait() == [(other, EPOLLIN)]
        os.read(reading, 1)
        assert epoll.wait(0) == []
        epoll.close()


def cookies_by_mod() -> None:
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLIN, 0)
    ends.a.sendall(b"x")
    for cookie in _COOKIES:
        epoll.mod(ends.b, EPOLLIN, cookie)
        assert epoll.wait() == [(cookie, EPOLLIN)]


def the_same_cookie_for_all() -> None:
    epoll = Epoll()
    many = [pair() for _ in range(3)]
    for ends in many:
        epoll.add(ends.b, EPOLLIN, 42)
        ends.a.sendall(b"x")
    for ends in many:
        readable(ends.b)
    assert epoll.wait() == [(42, EPOLLIN)] * 3


def mixed_kinds() -> None:
    """A pipe, an eventfd, a listener, a Unix socket and connections in one set."""
    epoll = Epoll()
    ends = pair()
    reading, writing = os.pipe()
    event = os.eventfd(0, os.EFD_NONBLOCK)
    one, two = socket.socketpair()
    with listener() as listening:
        for cookie, file in enumerate([ends.b, reading, event, one, listening]):
            epoll.add(file, EPOLLIN, cookie)
        actions: list[tuple[int, Callable[[], object], Callable[[], object]]] = [
            (0, lambda: ends.a.sendall(b"x"), lambda: ends.b.recv(9)),
            (1, lambda: os.write(writing, b"x"), lambda: os.read(reading, 9)),
            (2, lambda: os.eventfd_write(event, 1), lambda: os.eventfd_read(event)),
            (3, lambda: two.send(b"x"), lambda: one.recv(9)),
        ]
        for cookie, fire, clear in actions * 2:
            task = Task(epoll.wait, -1).until_asleep()
            fire()
            assert task.result() == [(cookie, EPOLLIN)]
            clear()
            assert epoll.wait(0) == []
        for _, fire, _ in actions:
            fire()
        client = socket.create_connection(listening.getsockname())
        readable(ends.b)
        until(lambda: len(epoll.wait(0)) == 5, "all five are ready")
        assert sorted(epoll.wait(0)) == [(n, EPOLLIN) for n in range(5)]
        client.close()


@each(0, EPOLLET)
def one_at_a_time_is_fair(edge: int) -> None:
    """With maxevents 1 and all ready, each gets its turn."""
    epoll = Epoll()
    many = [pair() for _ in range(5)]
    pipes = [os.pipe() for _ in range(3)]
    for cookie, ends in enumerate(many):
        epoll.add(ends.b, EPOLLIN | edge, cookie)
        ends.a.sendall(b"x")
        readable(ends.b)
    for cookie, (reading, writing) in enumerate(pipes):
        epoll.add(reading, EPOLLIN | edge, 100 + cookie)
        os.write(writing, b"x")
    everything = {*range(5), 100, 101, 102}
    for turn in range(1 if edge else 4):
        seen = set()
        for _ in range(16 if not edge else 8):
            got = epoll.wait(most=1)
            assert len(got) == 1
            seen.add(got[0][0])
        assert seen == everything, turn
    if edge:
        assert epoll.wait(0) == []


def a_busy_connection_does_not_starve_a_pipe() -> None:
    """One connection is always ready; a pipe that becomes ready is still seen."""
    ends, epoll = pair(), Epoll()
    reading, writing = os.pipe()
    epoll.add(ends.b, EPOLLIN, 1)
    epoll.add(reading, EPOLLIN, 2)
    ends.a.sendall(b"x")
    for _ in range(10):
        assert epoll.wait(most=1) == [(1, EPOLLIN)]
    os.write(writing, b"x")
    seen = [epoll.wait(most=1)[0][0] for _ in range(6)]
    assert 2 in seen
    assert 1 in seen


def a_busy_pipe_does_not_starve_a_connection() -> None:
    ends, epoll = pair(), Epoll()
    reading, writing = os.pipe()
    epoll.add(reading, EPOLLIN, 2)
    epoll.add(ends.b, EPOLLIN, 1)
    os.write(writing, b"x")
    for _ in range(10):
        assert epoll.wait(most=1) == [(2, EPOLLIN)]
    ends.a.sendall(b"x")
    readable(ends.b)
    seen = [epoll.wait(most=1)[0][0] for _ in range(6)]
    assert 1 in seen
    assert 2 in seen


@each(0, EPOLLET)
def one_connection_in_several_sets(edge: int) -> None:
    """Each set reports for itself."""
    ends = pair()
    sets = [Epoll() for _ in range(3)]
    for cookie, epoll in enumerate(sets):
        epoll.add(ends.b, EPOLLIN | edge, cookie)
    for _ in range(3):
        tasks = [Task(epoll.wait, -1).until_asleep() for epoll in sets]
        ends.a.sendall(b"x")
        assert [task.result() for task in tasks] == [[(n, EPOLLIN)] for n in range(3)]
        assert ends.b.recv(9) == b"x"
        for epoll in sets:
            assert epoll.wait(0) == []
    sets[1].remove(ends.b)
    ends.a.sendall(b"x")
    assert sets[0].wait() == [(0, EPOLLIN)]
    assert sets[2].wait() == [(2, EPOLLIN)]
    assert sets[1].wait(0) == []


def three_sets_never_miss_an_edge() -> None:
    """A thread sleeps in each of three sets; every arrival wakes all of them."""
    ends = pair()
    sets = [Epoll() for _ in range(3)]
    for cookie, epoll in enumerate(sets):
        epoll.add(ends.b, EPOLLIN | EPOLLET, cookie)
    seen = [0, 0, 0]
    rounds = 300

    def count(index: int) -> None:
        while seen[index] < rounds:
            assert sets[index].wait() == [(index, EPOLLIN)]
            seen[index] += 1

    tasks = [Task(count, index) for index in range(3)]
    for turn in range(1, rounds + 1):
        ends.a.sendall(b"x")
        wanted = [turn] * 3
        until(partial(eq, seen, wanted), f"edge {turn} in all sets")
        assert ends.b.recv(1) == b"x"
    for task in tasks:
        task.result()


def both_ends_in_one_set() -> None:
    ends, epoll = pair(), Epoll()
    epoll.add(ends.a, EPOLLIN | EPOLLET, 1)
    epoll.add(ends.b, EPOLLIN | EPOLLET, 2)
    for _ in range(10):
        ends.a.sendall(b"x")
        assert epoll.wait() == [(2, EPOLLIN)]
        assert ends.b.recv(9) == b"x"
        ends.b.sendall(b"y")
        assert epoll.wait() == [(1, EPOLLIN)]
        assert ends.a.recv(9) == b"y"
        assert epoll.wait(0) == []


def duplicates_in_one_set() -> None:
    """Two numbers of one connection are two registrations."""
    ends, epoll = pair(), Epoll()
    copy = os.dup(ends.b.fileno())
    epoll.add(ends.b, EPOLLIN, 1)
    epoll.add(copy, EPOLLIN, 2)
    ends.a.sendall(b"x")
    readable(ends.b)
    assert sorted(epoll.wait()) == [(1, EPOLLIN), (2, EPOLLIN)]
    epoll.remove(copy)
    assert epoll.wait() == [(1, EPOLLIN)]
    os.close(copy)
    assert epoll.wait() == [(1, EPOLLIN)]


def several_threads_wait_in_one_set() -> None:
    """Edge triggered: an arrival wakes one of them; nothing is lost or doubled."""
    epoll = Epoll()
    many = [pair() for _ in range(4)]
    reading, writing = os.pipe()
    for cookie, ends in enumerate(many):
        ends.b.setblocking(False)
        epoll.add(ends.b, EPOLLIN | EPOLLET | EPOLLONESHOT, cookie)
    epoll.add(reading, EPOLLIN, 99)

    def work() -> int:
        served = 0
        while True:
            for cookie, _ in epoll.wait(-1, 1):
                if cookie == 99:
                    return served
                sock = many[cookie].b
                while True:
                    try:
                        data = sock.recv(100)
                    except BlockingIOError:
                        break
                    sock.sendall(data)
                    served += 1
                events = EPOLLIN | EPOLLET | EPOLLONESHOT
                epoll.mod(sock, events, cookie)

    tasks = [Task(work) for _ in range(3)]
    for turn in range(200):
        for ends in many:
            ends.a.sendall(b"%3d" % turn)
        for ends in many:
            assert receive(ends.a, 3) == b"%3d" % turn
    os.write(writing, b"stop")
    assert sum(task.result() for task in tasks) >= 200


def level_triggered_wakes_threads_in_turn() -> None:
    """Two threads in one set, one arrival each: both come back."""
    ends, epoll = [pair(), pair()], Epoll()
    for cookie, one in enumerate(ends):
        epoll.add(one.b, EPOLLIN, cookie)
    tasks = [Task(epoll.wait, -1).until_asleep() for _ in range(2)]
    for one in ends:
        one.a.sendall(b"x")
    for task in tasks:
        got = task.result()
        assert got
        assert {cookie for cookie, _ in got} <= {0, 1}


def nested_set() -> None:
    """A set inside a set: the outer one is ready when the inner one is."""
    ends, inner, outer = pair(), Epoll(), Epoll()
    inner.add(ends.b, EPOLLIN, 1)
    outer.add(inner.fd, EPOLLIN, 2)
    assert outer.wait(0) == []
    for _ in range(3):
        task = Task(outer.wait, -1).until_asleep()
        ends.a.sendall(b"x")
        assert task.result() == [(2, EPOLLIN)]
        assert outer.wait() == [(2, EPOLLIN)]
        assert inner.wait() == [(1, EPOLLIN)]
        assert ends.b.recv(1) == b"x"
        assert outer.wait(0) == []
        assert inner.wait(0) == []


def nested_set_wakes_after_a_look() -> None:
    """Both sets were asked and said nothing; then data wakes the outer one."""
    ends, inner, outer = pair(), Epoll(), Epoll()
    inner.add(ends.b, EPOLLIN, 1)
    outer.add(inner.fd, EPOLLIN, 2)
    for _ in range(3):
        assert inner.wait(0) == []
        outer.wait(0)
        task = Task(outer.wait, -1).until_asleep()
        ends.a.sendall(b"x")
        assert task.result() == [(2, EPOLLIN)]
        assert inner.wait() == [(1, EPOLLIN)]
        assert ends.b.recv(1) == b"x"


def nested_set_made_before_the_upgrade() -> None:
    with listener() as listening:
        ends = connected(listening)
    inner, outer = Epoll(), Epoll()
    inner.add(ends.b, EPOLLIN, 1)
    outer.add(inner.fd, EPOLLIN, 2)
    upgrade(ends)
    task = Task(outer.wait, -1).until_asleep()
    ends.a.sendall(b"x")
    assert task.result() == [(2, EPOLLIN)]
    assert inner.wait() == [(1, EPOLLIN)]


def nested_set_is_not_ready_for_nothing() -> None:
    """What happens in another set, or uninteresting things, do not make it ready."""
    ends, inner, outer, other = pair(), Epoll(), Epoll(), Epoll()
    inner.add(ends.b, EPOLLIN, 1)
    outer.add(inner.fd, EPOLLIN, 2)
    other.add(ends.b, EPOLLOUT, 3)
    assert outer.wait(0) == []
    assert other.wait() == [(3, EPOLLOUT)]
    ends.a.sendall(b"x")
    assert ends.b.recv(9) == b"x"
    assert outer.wait(0) == []
    assert outer.wait(10) == []
    ends.a.sendall(b"x")
    assert outer.wait() == [(2, EPOLLIN)]


def nested_set_twice_over() -> None:
    ends, inner, middle, outer = pair(), Epoll(), Epoll(), Epoll()
    inner.add(ends.b, EPOLLIN, 1)
    middle.add(inner.fd, EPOLLIN, 2)
    outer.add(middle.fd, EPOLLIN, 3)
    for _ in range(3):
        assert outer.wait(0) == []
        task = Task(outer.wait, -1).until_asleep()
        ends.a.sendall(b"x")
        assert task.result() == [(3, EPOLLIN)]
        assert poll_one(outer.fd, select.POLLIN, 0) == select.POLLIN
        assert middle.wait() == [(2, EPOLLIN)]
        assert inner.wait() == [(1, EPOLLIN)]
        assert ends.b.recv(1) == b"x"
        assert poll_one(outer.fd, select.POLLIN, 0) == 0


def nested_set_one_shot() -> None:
    ends, inner, outer = pair(), Epoll(), Epoll()
    inner.add(ends.b, EPOLLIN, 1)
    outer.add(inner.fd, EPOLLIN | EPOLLONESHOT, 2)
    assert outer.wait(0) == []
    for cookie in range(2, 5):
        ends.a.sendall(b"x")
        assert outer.wait() == [(cookie, EPOLLIN)]
        assert outer.wait(0) == []
        assert inner.wait() == [(1, EPOLLIN)]
        assert ends.b.recv(1) == b"x"
        outer.mod(inner.fd, EPOLLIN | EPOLLONESHOT, cookie + 1)
        assert outer.wait(0) == []


def nested_set_with_any_cookie() -> None:
    ends, inner, outer = pair(), Epoll(), Epoll()
    inner.add(ends.b, EPOLLIN, 1)
    ends.a.sendall(b"x")
    outer.add(inner.fd, EPOLLIN, 0)
    for cookie in _COOKIES:
        outer.mod(inner.fd, EPOLLIN, cookie)
        assert outer.wait() == [(cookie, EPOLLIN)]
    outer.remove(inner.fd)
    assert outer.wait(0) == []
    assert outer.ctl(outer.MOD, inner.fd, EPOLLIN, 1) == (-1, 2)
    outer.add(inner.fd, EPOLLIN, 5)
    assert outer.ctl(outer.ADD, inner.fd, EPOLLIN, 6) == (-1, 17)
    assert outer.wait() == [(5, EPOLLIN)]
    events = EPOLLIN | EPOLLEXCLUSIVE
    assert Epoll().ctl(outer.ADD, inner.fd, events, 1) == (-1, 22)


def several_sets_inside_poll() -> None:
    """Each answers for itself, though one bell may ring for all of them."""
    ends = pair()
    sets = [Epoll() for _ in range(3)]
    sets[0].add(ends.b, EPOLLIN, 1)
    sets[1].add(ends.b, EPOLLOUT, 1)
    sets[2].add(ends.a, EPOLLIN, 1)
    poller = select.poll()
    for one in sets:
        poller.register(one.fd, select.POLLIN)
    assert poller.poll(0) == [(sets[1].fd, select.POLLIN)]
    sets[1].mod(ends.b, EPOLLIN, 1)
    assert poller.poll(0) == []
    assert poller.poll(10) == []
    ends.b.sendall(b"x")
    assert poller.poll(8000) == [(sets[2].fd, select.POLLIN)]
    assert ends.a.recv(1) == b"x"
    assert poller.poll(0) == []


@each(0, EPOLLET)
def set_inside_poll_with_a_pipe(edge: int) -> None:
    """What poll learns of the kernel's files is not kept, nor lost."""
    ends, epoll = pair(), Epoll()
    reading, writing = os.pipe()
    epoll.add(ends.b, EPOLLIN, 1)
    epoll.add(reading, EPOLLIN | edge, 2)
    assert poll_one(epoll.fd, select.POLLIN, 0) == 0
    os.write(writing, b"x")
    for _ in range(3):
        assert poll_one(epoll.fd, select.POLLIN, 0) == select.POLLIN
    assert epoll.wait() == [(2, EPOLLIN)]
    assert epoll.wait(0) == ([] if edge else [(2, EPOLLIN)])
    os.write(writing, b"x")
    assert poll_one(epoll.fd, select.POLLIN, 0) == select.POLLIN
    assert os.read(reading, 9) == b"xx"
    if not edge:
        assert poll_one(epoll.fd, select.POLLIN, 0) == 0
        assert epoll.wait(0) == []


def set_inside_poll_after_its_sockets_are_gone() -> None:
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLIN | EPOLLET, 1)
    ends.a.sendall(b"x")
    readable(ends.b)
    ends.close()
    assert poll_one(epoll.fd, select.POLLIN, 0) == 0
    assert epoll.wait(0) == []


def set_inside_poll() -> None:
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLIN, 1)
    assert poll_one(epoll.fd, select.POLLIN, 0) == 0
    for _ in range(3):
        task = Task(poll_one, epoll.fd, select.POLLIN, -1).until_asleep()
        ends.a.sendall(b"x")
        assert task.result() == select.POLLIN
        assert epoll.wait() == [(1, EPOLLIN)]
        assert ends.b.recv(1) == b"x"
        assert poll_one(epoll.fd, select.POLLIN, 0) == 0


def set_inside_select() -> None:
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLIN, 1)
    assert select.select([epoll.fd], [], [], 0)[0] == []
    task = Task(select.select, [epoll.fd], [], []).until_asleep()
    ends.a.sendall(b"x")
    assert task.result()[0] == [epoll.fd]
    assert epoll.wait() == [(1, EPOLLIN)]


def set_inside_poll_with_data_before() -> None:
    ends, epoll = pair(), Epoll()
    ends.a.sendall(b"x")
    readable(ends.b)
    epoll.add(ends.b, EPOLLIN, 1)
    assert poll_one(epoll.fd, select.POLLIN, 0) == select.POLLIN
    assert ends.b.recv(1) == b"x"
    assert poll_one(epoll.fd, select.POLLIN, 0) == 0


def exclusive() -> None:
    """EPOLLEXCLUSIVE: at least one set wakes."""
    ends = pair()
    sets = [Epoll(), Epoll()]
    for cookie, epoll in enumerate(sets):
        epoll.add(ends.b, EPOLLIN | EPOLLEXCLUSIVE, cookie)
    tasks = [Task(epoll.wait, -1).until_asleep() for epoll in sets]
    ends.a.sendall(b"x")
    until(lambda: any(task.finished.is_set() for task in tasks), "one wakes")
    # The other may sleep on; a file of its own wakes it.
    for epoll in sets:
        epoll.add(os.eventfd(1), EPOLLIN, 77)
    got = [event for task in tasks for event in task.result()]
    assert (0, EPOLLIN) in got or (1, EPOLLIN) in got


def exclusive_cannot_be_modified() -> None:
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLIN | EPOLLEXCLUSIVE, 1)
    assert epoll.ctl(epoll.MOD, ends.b.fileno(), EPOLLIN, 1) == (-1, 22)
    other = pair()
    events = EPOLLIN | EPOLLEXCLUSIVE | EPOLLONESHOT
    assert epoll.ctl(epoll.ADD, other.b.fileno(), events, 1) == (-1, 22)
    events = EPOLLIN | EPOLLEXCLUSIVE
    assert epoll.ctl(epoll.MOD, other.b.fileno(), events, 1) == (-1, 22)


@each("ring", "pipe", "close")
def sleeper_wakes_by(what: str) -> None:
    epoll = Epoll()
    sock, peer = far_pair()
    reading, writing = os.pipe()
    epoll.add(sock, EPOLLIN | EPOLLRDHUP, 1)
    epoll.add(reading, EPOLLIN, 2)
    for _ in range(1 if what == "close" else 4):
        task = Task(epoll.wait, -1).until_asleep()
        if what == "ring":
            peer.call("send", b"x")
            assert task.result() == [(1, EPOLLIN)]
            assert sock.recv(9) == b"x"
        elif what == "pipe":
            os.write(writing, b"x")
            assert task.result() == [(2, EPOLLIN)]
            os.read(reading, 1)
        else:
            peer.call("close")
            assert task.result() == [(1, EPOLLIN | EPOLLRDHUP)]
    peer.finish()


def many_ready_more_than_asked() -> None:
    """Twelve ready, five asked: no duplicates, and all are seen in the end."""
    epoll = Epoll()
    many = [pair() for _ in range(12)]
    for cookie, ends in enumerate(many):
        epoll.add(ends.b, EPOLLIN | EPOLLET, cookie)
        ends.a.sendall(b"x")
    for ends in many:
        readable(ends.b)
    seen: list[int] = []
    while got := epoll.wait(0, 5):
        assert len(got) <= 5
        seen += [cookie for cookie, _ in got]
    assert sorted(seen) == list(range(12))


def python_epoll_object() -> None:
    ends = pair()
    with select.epoll() as epoll:
        epoll.register(ends.a, select.EPOLLIN)
        epoll.register(ends.b, select.EPOLLIN | select.EPOLLOUT)
        ends.b.sendall(b"x")
        until(lambda: len(epoll.poll(0)) == 2, "both are ready")
        assert sorted(epoll.poll()) == sorted(
            [(ends.a.fileno(), EPOLLIN), (ends.b.fileno(), EPOLLOUT)]
        )
        epoll.modify(ends.b, 0)
        epoll.unregister(ends.a)
        assert epoll.poll(0) == []


def set_used_by_a_forked_child() -> None:
    """The set is one object for both processes."""
    ends, epoll = pair(), Epoll()
    epoll.add(ends.b, EPOLLIN, 5)
    ends.a.sendall(b"x")
    readable(ends.b)

    def child() -> None:
        assert epoll.wait() == [(5, EPOLLIN)]
        assert ends.b.recv(1) == b"x"
        assert epoll.wait(0) == []

    reap(forked(child))
    assert epoll.wait(0) == []
    ends.a.sendall(b"y")
    assert epoll.wait() == [(5, EPOLLIN)]


def duplicate_of_the_set() -> None:
    ends, epoll = pair(), Epoll()
    copy = os.dup(epoll.fd)
    epoll.add(ends.b, EPOLLIN, 5)
    ends.a.sendall(b"x")
    assert epoll.wait() == [(5, EPOLLIN)]
    epoll.close()
    epoll.fd = copy
    assert epoll.wait() == [(5, EPOLLIN)]
    assert ends.b.recv(1) == b"x"
    assert epoll.wait(0) == []


def number_of_a_closed_set_is_used_again() -> None:
    ends, first = pair(), Epoll()
    first.add(ends.b, EPOLLIN, 1)
    number = first.fd
    first.close()
    second = Epoll()
    assert second.fd == number
    ends.a.sendall(b"x")
    readable(ends.b)
    assert second.wait(0) == []
    second.add(ends.b, EPOLLIN, 2)
    assert second.wait() == [(2, EPOLLIN)]


def set_made_by_the_old_call() -> None:
    ends = pair()
    epoll = Epoll()
    epoll.close()
    epoll.fd = ok("epoll_create", 1)
    epoll.add(ends.b, EPOLLIN | EPOLLOUT, 3)
    assert epoll.wait() == [(3, EPOLLOUT)]


def echo_server_with_many_clients() -> None:
    """An edge-triggered server, 16 clients in another thread, everything comes back."""
    many: list[Pair] = [pair() for _ in range(16)]
    epoll = Epoll()
    for cookie, ends in enumerate(many):
        ends.b.setblocking(False)
        epoll.add(ends.b, EPOLLIN | EPOLLRDHUP | EPOLLET, cookie)

    def serve() -> None:
        alive = len(many)
        while alive:
            for cookie, _ in epoll.wait(-1):
                sock = many[cookie].b
                while True:
                    try:
                        data = sock.recv(4096)
                    except BlockingIOError:
                        break
                    if not data:
                        epoll.remove(sock)
                        alive -= 1
                        break
                    sock.sendall(data)

    task = Task(serve)
    for turn in range(60):
        for ends in many:
            ends.a.sendall(b"%4d" % turn)
        for ends in many:
            assert receive(ends.a, 4) == b"%4d" % turn
    for ends in many:
        ends.a.shutdown(socket.SHUT_WR)
    task.result()


@each(0, EPOLLET)
def one_event_at_a_time_and_no_time(edge: int) -> None:
    """What the library keeps in the set takes no place of the program's events."""
    ends = [pair() for _ in range(4)]
    reading, writing = os.pipe()
    os.write(writing, b"x")
    for _ in range(3):
        epoll = Epoll()
        for number, each_pair in enumerate(ends):
            epoll.add(each_pair.a, EPOLLIN | edge, number)
            epoll.add(each_pair.b, EPOLLIN | edge, 10 + number)
        epoll.add(reading, EPOLLIN, 99)
        assert epoll.wait(0, most=1) == [(99, EPOLLIN)]
        assert epoll.wait(0, most=1) == [(99, EPOLLIN)]
        epoll.close()
