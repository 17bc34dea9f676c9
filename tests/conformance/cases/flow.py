# SPDX-License-Identifier: Apache-2.0
"""Full and empty: partial writes, timeouts, and what the ioctls count."""

from __future__ import annotations

import array
import errno
import fcntl
import select
import socket
import struct
import termios

from tests.conformance.kit import (
    UNDER_KMAP,
    Elapsed,
    Task,
    assert_on_ring,
    c,
    each,
    expect,
    far_pair,
    pair,
    pattern,
    ping_pong,
    poll_one,
    readable,
    receive,
    receive_pattern,
    send_until_full,
    until,
)


def _fionread(sock: socket.socket) -> int:
    count = array.array("i", [-1])
    fcntl.ioctl(sock.fileno(), termios.FIONREAD, count)
    return count[0]


def _outq(sock: socket.socket) -> int:
    count = array.array("i", [-1])
    fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, count)
    return count[0]


def _timeout(sock: socket.socket, option: int, seconds: float) -> None:
    whole = int(seconds)
    value = struct.pack("ll", whole, int((seconds - whole) * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, option, value)


@each(1, 999, 65536, 1 << 20)
def fill_then_drain(chunk: int) -> None:
    """Partial writes at the brim; byte exact, twice over, from each end."""
    ends = pair()
    for sender, receiver in (ends, (ends.b, ends.a)):
        at = 0
        for _ in range(1 if chunk == 1 else 2):
            if chunk == 1:
                sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sent = send_until_full(sender, chunk, at)
            assert sent > 0
            # The kernel of a busy machine may acknowledge later still.
            while poll_one(sender, select.POLLOUT, 0):
                sent += send_until_full(sender, chunk, at + sent)
            receive_pattern(receiver, sent, at)
            at += sent
            assert poll_one(sender, select.POLLOUT) == select.POLLOUT
        sender.setblocking(True)
        receiver.setblocking(True)
    ping_pong(ends.a, ends.b, 4)


def partial_write_says_how_much() -> None:
    """One huge non-blocking send takes a part; writev too."""
    ends = pair()
    ends.a.setblocking(False)
    sent = ends.a.send(pattern(32 << 20))
    assert 0 < sent < 32 << 20
    receive_pattern(ends.b, sent)
    import os

    assert poll_one(ends.a, select.POLLOUT) == select.POLLOUT
    parts = [pattern(1 << 20, sent + (i << 20)) for i in range(24)]
    more = os.writev(ends.a.fileno(), parts)
    assert 0 < more < 24 << 20
    receive_pattern(ends.b, more, sent)


def slow_reader_across_processes() -> None:
    sock, peer = far_pair()
    sent = send_until_full(sock)
    sock.setblocking(True)
    task = Task(sock.sendall, pattern(3 << 20, sent)).until_asleep()
    peer.start("receive_pattern", sent + (3 << 20))
    task.result()
    peer.result()
    peer.finish()


def receive_timeout() -> None:
    """SO_RCVTIMEO: EAGAIN, not before the time is up."""
    ends = pair()
    _timeout(ends.b, socket.SO_RCVTIMEO, 0.05)
    for _ in range(2):
        elapsed = Elapsed()
        expect(errno.EAGAIN, ends.b.recv, 10)
        assert elapsed() >= 0.049
    ends.a.sendall(b"x")
    assert ends.b.recv(10) == b"x"
    _timeout(ends.b, socket.SO_RCVTIMEO, 0)
    task = Task(ends.b.recv, 10).until_asleep()
    ends.a.sendall(b"y")
    assert task.result() == b"y"


def receive_timeout_for_each_call() -> None:
    """read, recvmsg and readv obey it as well."""
    import os

    ends = pair()
    _timeout(ends.b, socket.SO_RCVTIMEO, 0.02)
    fd = ends.b.fileno()
    for call in (
        lambda: os.read(fd, 1),
        lambda: os.readv(fd, [bytearray(1)]),
        lambda: ends.b.recvmsg(1),
        lambda: ends.b.recvfrom(1),
    ):
        elapsed = Elapsed()
        expect(errno.EAGAIN, call)
        assert elapsed() >= 0.019


def receive_timeout_set_before_the_upgrade() -> None:
    ends = pair(upgraded=False)
    _timeout(ends.b, socket.SO_RCVTIMEO, 0.05)
    ping_pong(ends.a, ends.b)
    assert_on_ring(ends.b)
    elapsed = Elapsed()
    expect(errno.EAGAIN, ends.b.recv, 10)
    assert elapsed() >= 0.049


def receive_timeout_wakes_for_data() -> None:
    ends = pair()
    _timeout(ends.b, socket.SO_RCVTIMEO, 7)
    task = Task(ends.b.recv, 10).until_asleep()
    ends.a.sendall(b"x")
    assert task.result() == b"x"


def send_timeout() -> None:
    """SO_SNDTIMEO: EAGAIN when nothing fits, a short count when something did."""
    ends = pair()
    sent = send_until_full(ends.a)
    ends.a.setblocking(True)
    _timeout(ends.a, socket.SO_SNDTIMEO, 0.05)
    elapsed = Elapsed()
    expect(errno.EAGAIN, ends.a.send, b"x" * 100000)
    assert elapsed() >= 0.049
    receive_pattern(ends.b, sent)
    assert poll_one(ends.a, select.POLLOUT) == select.POLLOUT
    short = ends.a.send(pattern(32 << 20, sent))
    assert 0 < short < 32 << 20
    receive_pattern(ends.b, short, sent)


def python_timeout() -> None:
    """Settimeout makes the fd non-blocking and polls."""
    ends = pair()
    ends.b.settimeout(0.05)
    elapsed = Elapsed()
    try:
        ends.b.recv(1)
    except TimeoutError:
        assert elapsed() >= 0.049
    else:
        raise AssertionError("no timeout")
    ends.b.settimeout(7)
    task = Task(ends.b.recv, 10).until_asleep()
    ends.a.sendall(b"x")
    assert task.result() == b"x"


def python_timeout_of_sendall() -> None:
    ends = pair()
    ends.a.settimeout(0.05)
    try:
        ends.a.sendall(bytes(64 << 20))
    except TimeoutError:
        pass
    else:
        raise AssertionError("no timeout")


def fionread_counts_what_waits() -> None:
    ends = pair()
    assert _fionread(ends.b) == 0
    ends.a.sendall(pattern(1000))
    readable(ends.b)
    assert _fionread(ends.b) == 1000
    ends.a.sendall(pattern(500, 1000))
    until(lambda: _fionread(ends.b) == 1500, "1500 bytes wait")
    assert receive(ends.b, 700) == pattern(700)
    assert _fionread(ends.b) == 800
    assert receive(ends.b, 800) == pattern(800, 700)
    assert _fionread(ends.b) == 0


def fionread_with_peek_and_end() -> None:
    ends = pair()
    ends.a.sendall(b"abc")
    ends.a.close()
    readable(ends.b)
    ends.b.recv(3, socket.MSG_PEEK)
    assert _fionread(ends.b) == 3
    assert ends.b.recv(10) == b"abc"
    assert _fionread(ends.b) == 0
    assert ends.b.recv(10) == b""
    assert _fionread(ends.b) == 0


def outq_is_empty_when_all_was_read() -> None:
    ends = pair()
    ends.a.sendall(pattern(1000))
    receive_pattern(ends.b, 1000)
    until(lambda: _outq(ends.a) == 0, "the queue empties")


def outq_grows_when_the_reader_stalls() -> None:
    ends = pair()
    sent = send_until_full(ends.a)
    until(lambda: 0 < _outq(ends.a) <= sent, "bytes wait to be taken")
    receive_pattern(ends.b, sent)
    until(lambda: _outq(ends.a) == 0, "the queue empties")


def ioctl_of_an_unknown_request() -> None:
    ends = pair()
    assert c("ioctl", ends.a.fileno(), 0x7FFF1234, 0)[0] == -1


def ioctl_with_a_bad_pointer() -> None:
    ends = pair()
    for request in (termios.FIONREAD, termios.TIOCOUTQ):
        assert c("ioctl", ends.a.fileno(), request, 8) == (-1, errno.EFAULT)


def low_water_mark_delays_poll() -> None:
    """SO_RCVLOWAT: not readable below the mark; a read of the rest still works."""
    ends = pair()
    ends.b.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 10)
    assert ends.b.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 10
    ends.a.sendall(b"12345")
    until(lambda: _fionread(ends.b) == 5, "5 bytes wait")
    assert poll_one(ends.b, select.POLLIN, 0) == 0
    ends.a.sendall(b"67890")
    readable(ends.b)
    assert receive(ends.b, 10) == b"1234567890"


def low_water_mark_delays_recv() -> None:
    ends = pair()
    ends.b.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 6)
    task = Task(ends.b.recv, 100).until_asleep()
    ends.a.sendall(b"123")
    task.until_asleep()
    ends.a.sendall(b"456")
    assert task.result() == b"123456"


def buffer_sizes_may_change_at_any_time() -> None:
    ends = pair()
    for size in (16384, 1 << 20, 65536):
        for sock in ends:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        ping_pong(ends.a, ends.b, 2)
        task = Task(receive_pattern, ends.b, 50000)
        ends.a.sendall(pattern(50000))
        task.result()


def fill_both_ways() -> None:
    """Each end is full; then both drain."""
    ends = pair()
    one, two = send_until_full(ends.a), send_until_full(ends.b)
    assert poll_one(ends.a, select.POLLIN | select.POLLOUT) == select.POLLIN
    ends.a.setblocking(True)
    ends.b.setblocking(True)
    first, second = (
        Task(receive_pattern, ends.a, two),
        Task(receive_pattern, ends.b, one),
    )
    first.result()
    second.result()


def statistics_count_every_byte() -> None:
    """The ring counters are as exact as the bytes; the kernel has no such thing."""
    from tests.conformance.kit import row_of

    ends = pair()
    before = (row_of(ends.a), row_of(ends.b))
    task = Task(receive_pattern, ends.b, 1 << 20)
    ends.a.sendall(pattern(1 << 20))
    task.result()
    after = (row_of(ends.a), row_of(ends.b))
    if UNDER_KMAP:
        assert before[0]
        assert before[1]
        assert after[0]
        assert after[1]
        assert after[0].ring_tx - before[0].ring_tx == 1 << 20
        assert after[1].ring_rx - before[1].ring_rx == 1 << 20
    else:
        assert before == after == (None, None)
