# SPDX-License-Identifier: Apache-2.0
"""Shutdown and close, in every order, and the death of the peer."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import struct
from typing import Any

from tests.conformance.kit import (
    PATIENCE,
    PATIENCE_MS,
    Elapsed,
    Epoll,
    Task,
    connected,
    each,
    expect,
    far_pair,
    listener,
    pair,
    pattern,
    ping_pong,
    poll_one,
    readable,
    receive,
    receive_pattern,
    send_until_full,
    until,
    upgrade,
)

RD, WR, RDWR = socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR
IN, OUT, HUP, ERR = select.POLLIN, select.POLLOUT, select.POLLHUP, select.POLLERR
RDHUP = 0x2000
NOTICE = 1.0  # seconds in which the death of a peer must be seen


def _linger(sock: socket.socket, seconds: int) -> None:
    value = struct.pack("ii", 1, seconds)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, value)


def _error(sock: socket.socket) -> int:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


@each("a", "b")
def half_close(first: str) -> None:
    """One end stops writing; it still reads, the other still writes."""
    ends = pair()
    one, other = (ends.a, ends.b) if first == "a" else (ends.b, ends.a)
    one.sendall(b"last words")
    one.shutdown(WR)
    assert receive(other, 10) == b"last words"
    assert other.recv(10) == b""
    assert other.recv(10) == b""
    other.sendall(pattern(100000))
    receive_pattern(one, 100000)
    expect(errno.EPIPE, one.send, b"x", socket.MSG_NOSIGNAL)
    other.shutdown(WR)
    assert one.recv(10) == b""


def half_close_with_much_unread() -> None:
    ends = pair()
    sent = send_until_full(ends.a)
    ends.a.shutdown(WR)
    receive_pattern(ends.b, sent)
    assert ends.b.recv(1) == b""
    ends.b.sendall(b"and back")
    ends.a.setblocking(True)
    assert receive(ends.a, 8) == b"and back"


def half_close_across_processes() -> None:
    sock, peer = far_pair()
    sock.sendall(pattern(100000))
    sock.shutdown(WR)
    peer.call("receive_pattern", 100000)
    assert peer.call("recv", 1) == b""
    peer.call("send_pattern", 50000)
    peer.call("close")
    receive_pattern(sock, 50000)
    assert sock.recv(1) == b""
    peer.finish()


def shutdown_twice() -> None:
    ends = pair()
    ends.a.shutdown(WR)
    ends.a.shutdown(WR)
    ends.a.shutdown(RD)
    assert ends.b.recv(1) == b""


def shutdown_of_reading_here() -> None:
    """SHUT_RD: what waits is still read, then the end; the peer does not notice."""
    ends = pair()
    ends.a.sendall(b"before")
    readable(ends.b)
    ends.b.shutdown(RD)
    assert ends.b.recv(100) == b"before"
    assert ends.b.recv(100) == b""
    ends.b.sendall(b"still writes")
    assert receive(ends.a, 12) == b"still writes"


def shutdown_of_reading_then_data_comes() -> None:
    """Bytes sent after the peer's SHUT_RD are accepted, and may still be read."""
    ends = pair()
    ends.b.shutdown(RD)
    assert ends.b.recv(100) == b""
    assert ends.a.send(b"later") == 5
    until(lambda: ends.b.recv(100) == b"later", "the late bytes")
    assert ends.b.recv(100) == b""


def shutdown_of_both() -> None:
    ends = pair()
    ends.a.shutdown(RDWR)
    assert ends.a.recv(1) == b""
    expect(errno.EPIPE, ends.a.send, b"x", socket.MSG_NOSIGNAL)
    assert ends.b.recv(1) == b""
    ends.b.close()
    until(lambda: poll_one(ends.a, IN, 0) & HUP, "both directions are closed")


def shutdown_how_is_checked() -> None:
    ends = pair()
    expect(errno.EINVAL, ends.a.shutdown, 7)
    expect(errno.EINVAL, ends.a.shutdown, -1)
    ping_pong(ends.a, ends.b, 1)


def shutdown_after_the_peer_is_gone() -> None:
    """After both directions have ended: ENOTCONN."""
    ends = pair()
    ends.b.close()
    assert ends.a.recv(1) == b""
    ends.a.shutdown(WR)
    until(lambda: poll_one(ends.a, 0, 0) & HUP, "closed both ways")
    until(lambda: _tcp_state(ends.a) == 7, "the kernel's state is CLOSE")
    expect(errno.ENOTCONN, ends.a.shutdown, WR)


def _tcp_state(sock: socket.socket) -> int:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[0]


def close_then_read_the_rest() -> None:
    ends = pair()
    ends.a.sendall(pattern(100000))
    ends.a.close()
    receive_pattern(ends.b, 100000)
    assert ends.b.recv(1) == b""
    assert _error(ends.b) == 0


def close_with_a_full_queue() -> None:
    """All that was taken before close arrives."""
    ends = pair()
    sent = send_until_full(ends.a)
    ends.a.close()
    receive_pattern(ends.b, sent)
    assert ends.b.recv(1) == b""


def close_with_a_full_queue_across_processes() -> None:
    sock, peer = far_pair()
    sent = send_until_full(sock)
    sock.close()
    peer.call("receive_pattern", sent)
    assert peer.call("recv", 1) == b""
    peer.finish()


def close_by_exit_with_bytes_on_the_way() -> None:
    """A process that exits right after its write loses none of it."""
    sock, peer = far_pair()
    peer.call("send_pattern", 20000)
    peer.finish()
    receive_pattern(sock, 20000)
    assert sock.recv(1) == b""


def close_with_unread_bytes_resets() -> None:
    """The peer of an end that closed without reading gets ECONNRESET, once."""
    ends = pair()
    ends.a.sendall(b"never read")
    readable(ends.b)
    ends.b.close()
    expect(errno.ECONNRESET, ends.a.recv, 10)
    assert ends.a.recv(10) == b""
    expect(errno.EPIPE, ends.a.send, b"x", socket.MSG_NOSIGNAL)


def close_with_unread_bytes_resets_a_writer() -> None:
    ends = pair()
    ends.a.sendall(b"never read")
    readable(ends.b)
    ends.b.close()
    until(lambda: poll_one(ends.a, 0, 0) & ERR, "the reset")
    expect(errno.ECONNRESET, ends.a.send, b"x", socket.MSG_NOSIGNAL)
    expect(errno.EPIPE, ends.a.send, b"x", socket.MSG_NOSIGNAL)


def close_with_unread_bytes_wakes_a_reader() -> None:
    ends = pair()
    ends.a.sendall(b"never read")
    readable(ends.b)
    task = Task(ends.a.recv, 10).until_asleep()
    ends.b.close()
    expect(errno.ECONNRESET, task.result)


def close_with_unread_bytes_wakes_a_writer() -> None:
    ends = pair()
    sent = send_until_full(ends.a)
    ends.a.setblocking(True)
    task = Task(ends.a.sendall, bytes(64 << 20), socket.MSG_NOSIGNAL).until_asleep()
    assert sent
    ends.b.close()
    expect(errno.ECONNRESET, task.result)


def bytes_before_a_reset_are_read_first() -> None:
    """What arrived before the reset can still be read, then ECONNRESET, once."""
    ends = pair()
    ends.b.sendall(b"on the way")
    readable(ends.a)
    _linger(ends.b, 0)
    ends.b.close()
    until(lambda: poll_one(ends.a, 0, 0) & ERR, "the reset")
    assert ends.a.recv(100) == b"on the way"
    expect(errno.ECONNRESET, ends.a.recv, 100)
    assert ends.a.recv(100) == b""


def linger_zero_resets() -> None:
    ends = pair()
    _linger(ends.a, 0)
    ends.a.close()
    expect(errno.ECONNRESET, ends.b.recv, 10)
    assert ends.b.recv(10) == b""


def linger_zero_resets_a_blocked_reader() -> None:
    ends = pair()
    task = Task(ends.b.recv, 10).until_asleep()
    _linger(ends.a, 0)
    ends.a.close()
    expect(errno.ECONNRESET, task.result)


def linger_zero_across_processes() -> None:
    sock, peer = far_pair()
    peer.call("linger", 0)
    peer.call("close")
    expect(errno.ECONNRESET, sock.recv, 10)
    peer.finish()


def reset_shows_in_so_error() -> None:
    ends = pair()
    _linger(ends.a, 0)
    ends.a.close()
    until(lambda: poll_one(ends.b, 0, 0) & ERR, "the reset")
    assert _error(ends.b) == errno.ECONNRESET
    assert _error(ends.b) == 0
    assert ends.b.recv(10) == b""


def reset_in_poll() -> None:
    ends = pair()
    _linger(ends.a, 0)
    ends.a.close()
    mask = until(lambda: poll_one(ends.b, IN | OUT | RDHUP, 0) & ERR, "reset")
    assert mask
    assert poll_one(ends.b, IN | OUT | RDHUP, 0) == IN | OUT | RDHUP | ERR | HUP


def linger_with_time_and_all_read() -> None:
    ends = pair()
    _linger(ends.a, 5)
    ends.a.sendall(b"bye")
    ends.a.close()
    assert receive(ends.b, 3) == b"bye"
    assert ends.b.recv(1) == b""


def write_after_the_peer_closed() -> None:
    """The first is taken, then the reset arrives, then EPIPE."""
    ends = pair()
    ends.b.close()
    assert ends.a.recv(10) == b""
    assert ends.a.send(b"x", socket.MSG_NOSIGNAL) == 1
    until(lambda: poll_one(ends.a, 0, 0) & (ERR | HUP), "the reset")
    expect(errno.EPIPE, ends.a.send, b"x", socket.MSG_NOSIGNAL)
    assert ends.a.recv(10) == b""


def read_after_a_write_to_a_closed_peer() -> None:
    """A reset after the end of the stream was seen reads as the end."""
    ends = pair()
    ends.b.sendall(b"left")
    ends.b.close()
    readable(ends.a)
    assert ends.a.recv(10) == b"left"
    assert ends.a.recv(10) == b""


def shutdown_wakes_a_reader() -> None:
    """Another thread's shutdown ends a blocked recv with the end of the stream."""
    ends = pair()
    task = Task(ends.b.recv, 10).until_asleep()
    ends.b.shutdown(RD)
    assert task.result() == b""


def shutdown_of_both_wakes_a_reader() -> None:
    ends = pair()
    task = Task(ends.b.recv, 10).until_asleep()
    ends.b.shutdown(RDWR)
    assert task.result() == b""


def shutdown_wakes_a_writer() -> None:
    ends = pair()
    send_until_full(ends.a)
    ends.a.setblocking(True)
    task = Task(ends.a.sendall, bytes(64 << 20), socket.MSG_NOSIGNAL).until_asleep()
    ends.a.shutdown(WR)
    expect(errno.EPIPE, task.result)


def shutdown_wakes_poll() -> None:
    ends = pair()
    task = Task(poll_one, ends.b, IN).until_asleep()
    ends.b.shutdown(RDWR)
    assert task.result() & IN


def shutdown_by_the_peer_wakes_a_reader() -> None:
    ends = pair()
    task = Task(ends.b.recv, 10).until_asleep()
    ends.a.shutdown(WR)
    assert task.result() == b""


def close_by_the_peer_wakes_a_reader() -> None:
    ends = pair()
    task = Task(ends.b.recv, 10).until_asleep()
    ends.a.close()
    assert task.result() == b""


def shutdown_by_another_process() -> None:
    """A forked child shuts the shared connection; a blocked parent wakes."""
    from tests.conformance.kit import forked, reap

    ends = pair()
    task = Task(ends.b.recv, 10).until_asleep()
    reap(forked(lambda: ends.b.shutdown(RDWR)))
    assert task.result() == b""
    assert ends.a.recv(1) == b""


def close_does_not_wake_a_reader() -> None:
    """The kernel keeps the file for a reader that is in it; data still arrives."""
    ends = pair()
    fd = ends.b.detach()
    task = Task(os.read, fd, 10).until_asleep()
    os.close(fd)
    task.until_asleep()
    ends.a.sendall(b"x")
    assert task.result() == b"x"


def dup2_under_a_blocked_reader() -> None:
    """The reader stays with the old connection, the number belongs to the new one."""
    ends, other = pair(), pair()
    task = Task(os.read, ends.b.fileno(), 10).until_asleep()
    os.dup2(other.b.fileno(), ends.b.fileno())
    other.a.sendall(b"new")
    readable(ends.b)
    assert os.read(ends.b.fileno(), 10) == b"new"
    assert not task.finished.is_set()
    ends.a.sendall(b"old")
    assert task.result() == b"old"


def poll_masks_of_half_close() -> None:
    ends = pair()
    everything = IN | OUT | RDHUP | select.POLLPRI
    assert poll_one(ends.b, everything, 0) == OUT
    ends.a.shutdown(WR)
    until(lambda: poll_one(ends.b, everything, 0) == IN | OUT | RDHUP, "peer's end")
    assert poll_one(ends.a, everything, 0) == OUT
    ends.b.shutdown(WR)
    until(lambda: poll_one(ends.b, everything, 0) & HUP, "both ends")
    assert poll_one(ends.b, everything, 0) == IN | OUT | RDHUP | HUP
    until(lambda: poll_one(ends.a, everything, 0) & HUP, "both ends")
    assert poll_one(ends.a, everything, 0) == IN | OUT | RDHUP | HUP


def poll_masks_of_own_shutdown_of_reading() -> None:
    ends = pair()
    ends.b.shutdown(RD)
    assert poll_one(ends.b, IN | OUT | RDHUP, 0) == IN | OUT | RDHUP


def _blocked_recv(sock: socket.socket) -> object:
    try:
        return sock.recv(10)
    except ConnectionResetError:
        return b""


def _blocked_poll(sock: socket.socket) -> object:
    return poll_one(sock, IN)


def _blocked_select(sock: socket.socket) -> object:
    return select.select([sock], [], [], 8)[0]


def _blocked_epoll(sock: socket.socket) -> object:
    epoll = Epoll()
    epoll.add(sock, select.EPOLLIN | (select.EPOLLET & 0xFFFFFFFF), 5)
    got: list[tuple[int, int]] = []
    while not got:
        got = [g for g in epoll.wait() if g[1] & select.EPOLLIN]
    return got


def _blocked_send(sock: socket.socket) -> object:
    try:
        sock.sendall(bytes(64 << 20), socket.MSG_NOSIGNAL)
    except OSError as error:
        return error.errno in (errno.ECONNRESET, errno.EPIPE)
    return None


@each(_blocked_recv, _blocked_poll, _blocked_select, _blocked_epoll, _blocked_send)
def peer_killed(blocked: object) -> None:
    """SIGKILL of the peer is noticed within a second, whatever one is blocked in."""
    assert callable(blocked)
    sock, peer = far_pair()
    task = Task(blocked, sock).until_asleep()
    peer.kill()
    elapsed = Elapsed()
    value = task.result()
    assert elapsed() < NOTICE
    if blocked is _blocked_recv:
        assert value == b""
    else:
        assert value


@each(_blocked_recv, _blocked_poll, _blocked_select, _blocked_epoll, _blocked_send)
def peer_killed_which_accepted(blocked: object) -> None:
    assert callable(blocked)
    sock, peer = far_pair(far_accepts=True)
    task = Task(blocked, sock).until_asleep()
    peer.kill()
    elapsed = Elapsed()
    task.result()
    assert elapsed() < NOTICE


def peer_killed_after_it_wrote() -> None:
    """What a dead process had written is read to its end."""
    sock, peer = far_pair()
    peer.call("send_pattern", 10000)
    peer.kill()
    receive_pattern(sock, 10000)
    assert sock.recv(1) == b""


def peer_killed_with_unread_bytes() -> None:
    """The kernel closes the dead end with unread data: a reset."""
    sock, peer = far_pair()
    sock.sendall(b"never read")
    peer.kill()
    expect(errno.ECONNRESET, sock.recv, 10)


def peer_killed_while_stopped() -> None:
    sock, peer = far_pair()
    os.kill(peer.pid, signal.SIGSTOP)
    sock.setblocking(False)
    expect(errno.EAGAIN, sock.recv, 1)
    sock.setblocking(True)
    task = Task(sock.recv, 1).until_asleep()
    peer.kill()
    assert task.result() == b""


def peer_stopped_is_only_slow() -> None:
    """A stopped peer is not a dead one."""
    sock, peer = far_pair()
    os.kill(peer.pid, signal.SIGSTOP)
    sent = send_until_full(sock)
    assert poll_one(sock, OUT, 20) == 0
    os.kill(peer.pid, signal.SIGCONT)
    peer.call("receive_pattern", sent)
    assert poll_one(sock, OUT) == OUT
    peer.finish()


def close_many_leaves_no_descriptor() -> None:
    """Upgraded connections that are closed give back every descriptor."""
    first = pair()
    first.close()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        ends = pair()
        ends.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def close_in_any_order_of_many() -> None:
    import random

    rng = random.Random(3)
    many = [pair() for _ in range(12)]
    socks = [sock for ends in many for sock in ends]
    rng.shuffle(socks)
    others = {id(e.a): e.b for e in many} | {id(e.b): e.a for e in many}
    gone: set[int] = set()
    for sock in socks:
        other = others[id(sock)]
        sock.close()
        gone.add(id(sock))
        if id(other) not in gone:
            assert other.recv(1) == b""


@each("poll", "select")
def plain_socket_closed_under_a_wait(name: str) -> None:
    """The wait goes on; what is made meanwhile is none of its business.

    What comes to stand in the place of the closed socket must be as any other: the
    wait that returns counts itself out of the old one only.
    """
    ends, listening = pair(upgraded=False), listener()
    number = ends.b.fileno()
    if name == "poll":
        poller = select.poll()
        poller.register(number, select.POLLIN)
        task: Task[Any] = Task(poller.poll, PATIENCE_MS).until_asleep()
    else:
        task = Task(select.select, [number], [], [], PATIENCE).until_asleep()
    # Readable as soon as the wait looks again, which the data makes it do.
    with open(os.devnull) as null:
        os.dup2(null.fileno(), number)
    others = [connected(listening) for _ in range(3)]
    ends.a.send(b"x")
    task.result()
    for other in others:
        upgrade(other)
