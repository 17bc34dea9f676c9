# SPDX-License-Identifier: Apache-2.0
"""poll, ppoll, select and pselect."""

from __future__ import annotations

import ctypes
import os
import select
import socket
from collections.abc import Callable

from tests.conformance.kit import (
    PATIENCE_MS,
    Elapsed,
    PollFd,
    Task,
    assert_on_ring,
    c,
    each,
    far_pair,
    number,
    ok,
    pair,
    pattern,
    ping_pong,
    poll_one,
    receive,
    receive_pattern,
    send_until_full,
    timespec,
)

IN, OUT, PRI = select.POLLIN, select.POLLOUT, select.POLLPRI
HUP, ERR, NVAL, RDHUP = select.POLLHUP, select.POLLERR, select.POLLNVAL, 0x2000

# A wait takes (file, events) pairs and milliseconds; gives a mask for each file.
Wait = Callable[[list[tuple[object, int]], int], list[int]]


def _entries(files: list[tuple[object, int]]) -> ctypes.Array[PollFd]:
    return (PollFd * len(files))(*(PollFd(number(f), e, -1) for f, e in files))


def _poll(files: list[tuple[object, int]], timeout: int) -> list[int]:
    entries = _entries(files)
    count = ok("poll", entries, len(files), timeout)
    masks = [entry.revents for entry in entries]
    assert count == sum(1 for mask in masks if mask)
    return masks


def _ppoll(files: list[tuple[object, int]], timeout: int) -> list[int]:
    entries = _entries(files)
    when = None if timeout < 0 else timespec(timeout / 1000)
    count = ok("ppoll", entries, len(files), when, None)
    masks = [entry.revents for entry in entries]
    assert count == sum(1 for mask in masks if mask)
    return masks


def _sets(files: list[tuple[object, int]]) -> list[ctypes.Array[ctypes.c_uint64]]:
    reading, writing = (ctypes.c_uint64 * 16)(), (ctypes.c_uint64 * 16)()
    for file, events in files:
        fd = number(file)
        if events & IN:
            reading[fd // 64] |= 1 << (fd % 64)
        if events & OUT:
            writing[fd // 64] |= 1 << (fd % 64)
    return [reading, writing]


def _from_sets(
    files: list[tuple[object, int]], sets: list[ctypes.Array[ctypes.c_uint64]]
) -> list[int]:
    masks = []
    for file, _ in files:
        fd = number(file)
        bit = 1 << (fd % 64)
        masks.append(
            (IN if sets[0][fd // 64] & bit else 0)
            | (OUT if sets[1][fd // 64] & bit else 0)
        )
    return masks


def _select(files: list[tuple[object, int]], timeout: int) -> list[int]:
    sets = _sets(files)
    top = max((number(f) for f, _ in files), default=-1) + 1
    when = None if timeout < 0 else timespec(0)
    if when is not None:
        value = (ctypes.c_long * 2)(timeout // 1000, timeout % 1000 * 1000)
        count = ok("select", top, *sets, None, value)
    else:
        count = ok("select", top, *sets, None, None)
    assert count == sum(bin(word).count("1") for s in sets for word in s)
    return _from_sets(files, sets)


def _pselect(files: list[tuple[object, int]], timeout: int) -> list[int]:
    sets = _sets(files)
    top = max((number(f) for f, _ in files), default=-1) + 1
    when = None if timeout < 0 else timespec(timeout / 1000)
    count = ok("pselect", top, *sets, None, when, None)
    assert count == sum(bin(word).count("1") for s in sets for word in s)
    return _from_sets(files, sets)


_WAITS = (_poll, _ppoll, _select, _pselect)


@each(*_WAITS)
def nothing_to_read(wait: Wait) -> None:
    ends = pair()
    assert wait([(ends.b, IN)], 0) == [0]
    assert wait([(ends.b, IN | OUT)], 0) == [OUT]
    assert wait([(ends.b, IN | OUT)], -1) == [OUT]


@each(*_WAITS)
def something_to_read(wait: Wait) -> None:
    """Level triggered: as often as one asks, until it was read."""
    ends = pair()
    ends.a.sendall(b"abc")
    for _ in range(3):
        assert wait([(ends.b, IN)], PATIENCE_MS) == [IN]
    assert ends.b.recv(1) == b"a"
    assert wait([(ends.b, IN | OUT)], 0) == [IN | OUT]
    assert ends.b.recv(10) == b"bc"
    assert wait([(ends.b, IN)], 0) == [0]


@each(*_WAITS)
def wakes_for_data(wait: Wait) -> None:
    ends = pair()
    for _ in range(3):
        task = Task(wait, [(ends.b, IN)], -1).until_asleep()
        ends.a.sendall(b"x")
        assert task.result() == [IN]
        assert ends.b.recv(10) == b"x"


@each(*_WAITS)
def wakes_for_data_across_processes(wait: Wait) -> None:
    sock, peer = far_pair()
    for timeout in (-1, PATIENCE_MS):
        task = Task(wait, [(sock, IN)], timeout).until_asleep()
        peer.call("send", b"x")
        assert task.result() == [IN]
        assert sock.recv(10) == b"x"
    peer.finish()


@each(*_WAITS)
def wakes_for_room(wait: Wait) -> None:
    ends = pair()
    sent = send_until_full(ends.a)
    assert wait([(ends.a, OUT)], 0) == [0]
    task = Task(wait, [(ends.a, OUT)], -1).until_asleep()
    receive_pattern(ends.b, sent)
    assert task.result() == [OUT]
    assert ends.a.send(b"x") == 1


@each(*_WAITS)
def wakes_for_the_end(wait: Wait) -> None:
    ends = pair()
    task = Task(wait, [(ends.b, IN)], -1).until_asleep()
    ends.a.close()
    (mask,) = task.result()
    assert mask & IN
    assert ends.b.recv(1) == b""


@each(*_WAITS)
def several_ready_at_once(wait: Wait) -> None:
    many = [pair() for _ in range(6)]
    for ends in many[::2]:
        ends.a.sendall(b"x")
    for ends in many[::2]:
        poll_one(ends.b, IN)
    files: list[tuple[object, int]] = [(ends.b, IN) for ends in many]
    assert wait(files, PATIENCE_MS) == [IN, 0] * 3
    files = [(ends.b, IN | OUT) for ends in many]
    assert wait(files, PATIENCE_MS) == [IN | OUT, OUT] * 3


@each(*_WAITS)
def mixed_with_pipes(wait: Wait) -> None:
    """Either kind wakes the wait, and each is reported for itself."""
    ends = pair()
    reading, writing = os.pipe()
    files: list[tuple[object, int]] = [(reading, IN), (ends.b, IN), (writing, OUT)]
    assert wait(files, 0) == [0, 0, OUT]
    del files[2]
    task = Task(wait, files, -1).until_asleep()
    os.write(writing, b"p")
    assert task.result() == [IN, 0]
    assert os.read(reading, 10) == b"p"
    task = Task(wait, files, -1).until_asleep()
    ends.a.sendall(b"s")
    assert task.result() == [0, IN]
    os.write(writing, b"p")
    assert wait(files, PATIENCE_MS) == [IN, IN]
    assert ends.b.recv(10) == b"s"
    assert wait(files, PATIENCE_MS) == [IN, 0]


@each(*_WAITS)
def mixed_with_a_listener(wait: Wait) -> None:
    from tests.conformance.kit import listener

    ends = pair()
    with listener() as listening:
        files: list[tuple[object, int]] = [(ends.b, IN), (listening, IN)]
        task = Task(wait, files, -1).until_asleep()
        client = socket.create_connection(listening.getsockname())
        assert task.result() == [0, IN]
        server, _ = listening.accept()
    assert wait(files[:1], 0) == [0]
    client.close()
    server.close()


@each(*_WAITS)
def only_kernel_files(wait: Wait) -> None:
    """A wait without any connection of ours, while there are some."""
    ends = pair()
    reading, writing = os.pipe()
    assert wait([(reading, IN), (writing, OUT)], 0) == [0, OUT]
    os.write(writing, b"x")
    assert wait([(reading, IN)], -1) == [IN]
    ping_pong(ends.a, ends.b, 1)


@each(*_WAITS)
def timeout_is_not_early(wait: Wait) -> None:
    ends = pair()
    for timeout in (1, 10, 40):
        elapsed = Elapsed()
        assert wait([(ends.b, IN)], timeout) == [0]
        assert elapsed() >= timeout / 1000


@each(*_WAITS)
def timeout_with_nothing_to_watch(wait: Wait) -> None:
    pair()
    elapsed = Elapsed()
    assert wait([], 15) == []
    assert elapsed() >= 0.015


@each(*_WAITS)
def ready_file_needs_no_time(wait: Wait) -> None:
    """Out of many, one is ready: the wait does not sleep."""
    many = [pair() for _ in range(4)]
    many[3].a.sendall(b"x")
    files: list[tuple[object, int]] = [(ends.b, IN) for ends in many]
    assert wait(files, -1) == [0, 0, 0, IN]


@each(*_WAITS)
def two_threads_wait_for_one(wait: Wait) -> None:
    """Both wake."""
    ends = pair()
    tasks = [Task(wait, [(ends.b, IN)], -1).until_asleep() for _ in range(2)]
    ends.a.sendall(b"x")
    assert [task.result() for task in tasks] == [[IN], [IN]]


@each(*_WAITS)
def both_ends_in_one_wait(wait: Wait) -> None:
    ends = pair()
    files: list[tuple[object, int]] = [(ends.a, IN), (ends.b, IN)]
    assert wait(files, 0) == [0, 0]
    ends.a.sendall(b"x")
    assert wait(files, -1) == [0, IN]
    ends.b.sendall(b"y")
    poll_one(ends.a, IN)
    assert wait(files, -1) == [IN, IN]


def poll_same_file_twice() -> None:
    ends = pair()
    ends.a.sendall(b"x")
    poll_one(ends.b, IN)
    assert _poll([(ends.b, IN), (ends.b, OUT), (ends.b, IN | OUT)], -1) == [
        IN,
        OUT,
        IN | OUT,
    ]


def poll_negative_and_closed_numbers() -> None:
    """A negative number is skipped, a closed one is POLLNVAL."""
    ends = pair()
    closed = os.dup(ends.a.fileno())
    os.close(closed)
    assert _poll([(-1, IN), (ends.b, IN), (closed, IN)], -1) == [0, 0, NVAL]
    ends.a.sendall(b"x")
    assert _poll([(-5, IN | OUT), (ends.b, IN)], -1) == [0, IN]


def poll_reports_hup_without_asking() -> None:
    ends = pair()
    ends.a.close()
    ends.b.shutdown(socket.SHUT_WR)
    assert _poll([(ends.b, 0)], -1) == [HUP]
    assert _poll([(ends.b, IN)], -1) == [IN | HUP]


def poll_rdhup() -> None:
    ends = pair()
    task = Task(_poll, [(ends.b, RDHUP)], -1).until_asleep()
    ends.a.sendall(b"data does not end it")
    task.until_asleep()
    ends.a.shutdown(socket.SHUT_WR)
    assert task.result() == [RDHUP]
    assert _poll([(ends.b, IN | RDHUP)], -1) == [IN | RDHUP]


def poll_normal_and_band_bits() -> None:
    ends = pair()
    rdnorm, wrnorm, rdband, wrband = 0x40, 0x100, 0x80, 0x200
    ends.a.sendall(b"x")
    poll_one(ends.b, IN)
    asked = IN | OUT | PRI | rdnorm | wrnorm | rdband | wrband
    assert _poll([(ends.b, asked)], -1) == [IN | OUT | rdnorm | wrnorm]
    assert _poll([(ends.b, rdnorm)], -1) == [rdnorm]
    assert _poll([(ends.b, wrnorm)], -1) == [wrnorm]


def poll_no_entries() -> None:
    pair()
    assert ok("poll", None, 0, 0) == 0


def select_leaves_the_sets_on_error() -> None:
    ends = pair()
    closed = os.dup(ends.a.fileno())
    os.close(closed)
    sets = _sets([(ends.b, IN), (closed, IN)])
    before = bytes(sets[0])
    assert c("select", closed + 1, *sets, None, None)[0] == -1
    assert bytes(sets[0]) == before


def select_clears_what_is_not_ready() -> None:
    ends = pair()
    sets = _sets([(ends.a, IN), (ends.b, IN)])
    ends.a.sendall(b"x")
    poll_one(ends.b, IN)
    top = max(ends.a.fileno(), ends.b.fileno()) + 1
    assert ok("select", top, *sets, None, None) == 1
    assert _from_sets([(ends.a, IN), (ends.b, IN)], sets) == [0, IN]
    exceptional = (ctypes.c_uint64 * 16)()
    exceptional[ends.b.fileno() // 64] |= 1 << (ends.b.fileno() % 64)
    value = (ctypes.c_long * 2)(0, 0)
    assert ok("select", top, None, None, exceptional, value) == 0
    assert not any(exceptional)


def select_counts_down_its_timeout() -> None:
    """Linux leaves in the timeval what was not slept."""
    ends = pair()
    sets = _sets([(ends.b, IN)])
    value = (ctypes.c_long * 2)(5, 0)
    ends.a.sendall(b"x")
    poll_one(ends.b, IN)
    assert ok("select", ends.b.fileno() + 1, *sets, None, value) == 1
    assert 0 < value[0] * 1000000 + value[1] <= 5000000
    assert ends.b.recv(10) == b"x"
    sets = _sets([(ends.b, IN)])
    value = (ctypes.c_long * 2)(0, 10000)
    assert ok("select", ends.b.fileno() + 1, *sets, None, value) == 0
    assert (value[0], value[1]) == (0, 0)


def pselect_leaves_its_timeout() -> None:
    from tests.conformance.kit import TimeSpec

    ends = pair()
    sets = _sets([(ends.b, IN)])
    when = TimeSpec(0, 5000000)
    top = ends.b.fileno() + 1
    assert ok("pselect", top, *sets, None, ctypes.byref(when), None) == 0
    assert (when.sec, when.nsec) == (0, 5000000)


def timeouts_that_are_not_valid() -> None:
    from tests.conformance.kit import TimeSpec

    ends = pair()
    entries = _entries([(ends.b, IN)])
    for sec, nsec in ((-1, 0), (0, 1000000000), (0, -1)):
        when = ctypes.byref(TimeSpec(sec, nsec))
        assert c("ppoll", entries, 1, when, None) == (-1, 22)


def poll_writable_until_full() -> None:
    """Full, half drained, full again: never a false OUT that then cannot send."""
    ends = pair()
    at = 0
    for _ in range(3):
        sent = send_until_full(ends.a, 16384, at)
        assert poll_one(ends.a, OUT, 0) == 0
        receive_pattern(ends.b, sent, at)
        at += sent
        assert poll_one(ends.a, OUT) == OUT
        assert ends.a.send(pattern(1, at)) == 1
        receive_pattern(ends.b, 1, at)
        at += 1


def poll_readable_before_upgrade_and_after() -> None:
    ends = pair(upgraded=False)
    for turn in range(100):
        assert poll_one(ends.b, IN, 0) == 0
        ends.a.sendall(b"%d" % turn)
        assert poll_one(ends.b, IN) == IN
        assert ends.b.recv(10) == b"%d" % turn
        assert poll_one(ends.a, IN, 0) == 0
        ends.b.sendall(b"%d" % turn)
        assert poll_one(ends.a, IN) == IN
        assert ends.a.recv(10) == b"%d" % turn
    assert_on_ring(ends.a)
    assert_on_ring(ends.b)


def select_loop_server() -> None:
    """An echo server around select, eight clients."""
    many = [pair() for _ in range(8)]
    servers = [ends.b for ends in many]

    def serve() -> int:
        alive, echoed = set(servers), 0
        while alive:
            for sock in select.select(list(alive), [], [], 8)[0]:
                data = sock.recv(100)
                echoed += len(data)
                if data:
                    sock.sendall(data)
                else:
                    alive.discard(sock)
        return echoed

    task = Task(serve)
    for turn in range(50):
        for ends in many:
            ends.a.sendall(b"%3d" % turn)
        for ends in many:
            assert receive(ends.a, 3) == b"%3d" % turn
    for ends in many:
        ends.a.close()
    assert task.result() == 50 * 8 * 3
