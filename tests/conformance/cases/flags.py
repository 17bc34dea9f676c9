# SPDX-License-Identifier: Apache-2.0
"""The MSG_ flags."""

from __future__ import annotations

import errno
import select
import signal
import socket
import struct

from tests.conformance.kit import (
    MsgHdr,
    Task,
    buffers,
    each,
    expect,
    fails,
    far_pair,
    iovec,
    ok,
    pair,
    pattern,
    poll_one,
    readable,
    receive,
    receive_pattern,
    send_until_full,
)

PEEK, WAITALL = socket.MSG_PEEK, socket.MSG_WAITALL
DONTWAIT, TRUNC = socket.MSG_DONTWAIT, socket.MSG_TRUNC
NOSIGNAL, MORE = socket.MSG_NOSIGNAL, socket.MSG_MORE


def peek_leaves_the_bytes() -> None:
    ends = pair()
    ends.a.sendall(b"hello")
    readable(ends.b)
    assert ends.b.recv(3, PEEK) == b"hel"
    assert ends.b.recv(100, PEEK) == b"hello"
    assert poll_one(ends.b, select.POLLIN, 0) == select.POLLIN
    assert ends.b.recv(100) == b"hello"
    expect(errno.EAGAIN, ends.b.recv, 1, DONTWAIT)


def peek_blocks_until_there_is_a_byte() -> None:
    ends = pair()
    task = Task(ends.b.recv, 10, PEEK).until_asleep()
    ends.a.sendall(b"x")
    assert task.result() == b"x"
    assert ends.b.recv(10) == b"x"


def peek_at_the_end() -> None:
    ends = pair()
    ends.a.sendall(b"x")
    ends.a.close()
    assert ends.b.recv(10, PEEK) == b"x"
    assert ends.b.recv(10) == b"x"
    assert ends.b.recv(10, PEEK) == b""
    assert ends.b.recv(10) == b""


def peek_nothing_without_blocking() -> None:
    ends = pair()
    expect(errno.EAGAIN, ends.b.recv, 10, PEEK | DONTWAIT)


def peek_by_recvmsg_and_recvfrom() -> None:
    ends = pair()
    ends.a.sendall(b"abcdef")
    readable(ends.b)
    assert ends.b.recvfrom(4, PEEK)[0] == b"abcd"
    assert ends.b.recvmsg(100, 0, PEEK)[0] == b"abcdef"
    assert ends.b.recv(100) == b"abcdef"


def peek_far_into_the_stream() -> None:
    """Also over many writes and past where a ring wraps."""
    ends = pair()
    at = 0
    for _ in range(40):
        for _ in range(5):
            ends.a.sendall(pattern(700, at))
            at += 700
        readable(ends.b)
        peeked = ends.b.recv(3500, PEEK | WAITALL)
        assert peeked == pattern(len(peeked), at - 3500)
        assert receive(ends.b, 3500) == pattern(3500, at - 3500)


def peek_waits_for_all() -> None:
    """Under MSG_WAITALL a peek waits as a read does, and ends early with the stream."""
    ends = pair()
    ends.a.sendall(b"abc")
    task = Task(ends.b.recv, 9, PEEK | WAITALL).until_asleep()
    ends.a.sendall(b"def")
    task.until_asleep()
    ends.a.sendall(b"ghijkl")
    assert task.result() == b"abcdefghi"
    assert ends.b.recv(12) == b"abcdefghijkl"
    ends.a.sendall(b"mno")
    task = Task(ends.b.recv, 9, PEEK | WAITALL).until_asleep()
    ends.a.shutdown(socket.SHUT_WR)
    assert task.result() == b"mno"
    assert ends.b.recv(9, PEEK | WAITALL) == b"mno"


def peek_waits_for_the_least() -> None:
    """SO_RCVLOWAT holds for a peek, and so does a time limit."""
    ends = pair()
    ends.b.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 5)
    ends.a.sendall(b"abc")
    task = Task(ends.b.recv, 9, PEEK).until_asleep()
    ends.a.sendall(b"de")
    assert task.result() == b"abcde"
    assert ends.b.recv(5) == b"abcde"
    ends.a.sendall(b"fgh")
    assert ends.b.recv(9, PEEK | DONTWAIT) == b"fgh"
    limit = struct.pack("@ll", 0, 50_000)
    ends.b.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    assert ends.b.recv(9, PEEK) == b"fgh"


def waitall_waits_for_all() -> None:
    ends = pair()
    ends.a.sendall(b"abc")
    task = Task(ends.b.recv, 9, WAITALL).until_asleep()
    ends.a.sendall(b"def")
    task.until_asleep()
    ends.a.sendall(b"ghijkl")
    assert task.result() == b"abcdefghi"
    assert ends.b.recv(10) == b"jkl"


def waitall_gives_what_there_is_at_the_end() -> None:
    ends = pair()
    task = Task(ends.b.recv, 100, WAITALL)
    ends.a.sendall(b"short")
    task.until_asleep()
    ends.a.close()
    assert task.result() == b"short"


def waitall_of_a_megabyte() -> None:
    sock, peer = far_pair()
    peer.start("send_pattern", 1 << 20)
    assert sock.recv(1 << 20, WAITALL) == pattern(1 << 20)
    peer.result()
    peer.finish()


def waitall_non_blocking_gives_what_there_is() -> None:
    ends = pair()
    ends.b.setblocking(False)
    ends.a.sendall(b"abc")
    readable(ends.b)
    assert ends.b.recv(100, WAITALL) == b"abc"
    expect(errno.EAGAIN, ends.b.recv, 100, WAITALL)


def waitall_by_recvmsg() -> None:
    ends = pair()
    parts = buffers(4, 4)
    vector = iovec(parts)
    header = MsgHdr(iov=vector, iovlen=2)
    import ctypes

    task = Task(
        ok, "recvmsg", ends.b.fileno(), ctypes.byref(header), WAITALL
    ).until_asleep()
    ends.a.sendall(b"abcde")
    task.until_asleep()
    ends.a.sendall(b"fgh")
    assert task.result() == 8
    assert parts[0].raw + parts[1].raw == b"abcdefgh"


def waitall_stops_at_the_receive_timeout() -> None:
    """With part of the bytes there, the timeout returns that part."""
    import struct

    ends = pair()
    ends.b.setsockopt(
        socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 50000)
    )
    ends.a.sendall(b"abc")
    assert ends.b.recv(10, WAITALL) == b"abc"


def dontwait_on_a_blocking_socket() -> None:
    ends = pair()
    expect(errno.EAGAIN, ends.b.recv, 10, DONTWAIT)
    ends.a.sendall(b"x")
    readable(ends.b)
    assert ends.b.recv(10, DONTWAIT) == b"x"
    assert ends.b.getblocking()
    task = Task(ends.b.recv, 10).until_asleep()
    ends.a.sendall(b"y")
    assert task.result() == b"y"


def dontwait_send_when_full() -> None:
    ends = pair()
    sent = send_until_full(ends.a)
    ends.a.setblocking(True)
    assert fails("send", ends.a.fileno(), b"x", 1, DONTWAIT) == errno.EAGAIN
    task = Task(ends.a.sendall, pattern(100000, sent)).until_asleep()
    receive_pattern(ends.b, sent + 100000)
    task.result()


def trunc_discards() -> None:
    """On TCP the bytes are dropped and counted, and the buffer is not touched."""
    ends = pair()
    ends.a.sendall(b"abcdefgh")
    readable(ends.b)
    (buffer,) = buffers(8)
    assert ok("recv", ends.b.fileno(), buffer, 5, TRUNC) == 5
    assert buffer.raw == bytes(8)
    assert ends.b.recv(10) == b"fgh"


def trunc_needs_no_buffer() -> None:
    ends = pair()
    ends.a.sendall(b"abcdefgh")
    readable(ends.b)
    assert ok("recv", ends.b.fileno(), None, 100, TRUNC) == 8
    expect(errno.EAGAIN, ends.b.recv, 1, DONTWAIT)


def peek_and_trunc() -> None:
    """Counts what is there and leaves it."""
    ends = pair()
    ends.a.sendall(b"abcdefgh")
    readable(ends.b)
    assert ok("recv", ends.b.fileno(), None, 100, TRUNC | PEEK) == 8
    assert ends.b.recv(100) == b"abcdefgh"


def nosignal() -> None:
    """EPIPE without a signal where SIGPIPE would end the process."""
    ends = pair()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    ends.a.shutdown(socket.SHUT_WR)
    expect(errno.EPIPE, ends.a.send, b"x", NOSIGNAL)
    expect(errno.EPIPE, ends.a.sendmsg, [b"x"], [], NOSIGNAL)


@each(1, 100, 5000)
def more_then_the_rest(size: int) -> None:
    """MSG_MORE may hold bytes back, the next send without it gets all there."""
    ends = pair()
    assert ends.a.send(pattern(size), MORE) == size
    assert ends.a.send(pattern(size, size), MORE) == size
    assert ends.a.send(pattern(size, 2 * size)) == size
    assert receive(ends.b, 3 * size) == pattern(3 * size)


def more_and_then_shutdown() -> None:
    ends = pair()
    ends.a.send(b"held", MORE)
    ends.a.shutdown(socket.SHUT_WR)
    assert receive(ends.b, 4) == b"held"
    assert ends.b.recv(1) == b""


def cork_and_uncork() -> None:
    ends = pair()
    ends.a.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    ends.a.sendall(b"abc")
    ends.a.sendall(b"def")
    ends.a.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
    assert receive(ends.b, 6) == b"abcdef"


def unknown_flags_do_no_harm() -> None:
    ends = pair()
    assert ends.a.send(b"x", socket.MSG_EOR | socket.MSG_CONFIRM) == 1
    assert ends.b.recv(10) == b"x"
    assert ends.a.send(b"y", socket.MSG_DONTROUTE) == 1
    assert ends.b.recv(10, socket.MSG_CMSG_CLOEXEC) == b"y"


def error_queue_is_empty() -> None:
    ends = pair()
    ends.a.sendall(b"x")
    expect(errno.EAGAIN, ends.b.recv, 10, socket.MSG_ERRQUEUE)
    assert ends.b.recv(10) == b"x"


def urgent_byte_is_not_in_the_stream() -> None:
    ends = pair()
    ends.a.sendall(b"abc")
    ends.a.send(b"!", socket.MSG_OOB)
    ends.a.sendall(b"def")
    assert poll_one(ends.b, select.POLLPRI) & select.POLLPRI
    assert ends.b.recv(1, socket.MSG_OOB) == b"!"
    assert receive(ends.b, 6) == b"abcdef"


def no_urgent_byte() -> None:
    ends = pair()
    ends.a.sendall(b"abc")
    readable(ends.b)
    expect(errno.EINVAL, ends.b.recv, 1, socket.MSG_OOB)
    assert ends.b.recv(10) == b"abc"


def recvmsg_flags_are_clear() -> None:
    ends = pair()
    ends.a.sendall(b"abcdef")
    readable(ends.b)
    assert ends.b.recvmsg(3, 64)[1:3] == ([], 0)
    assert ends.b.recvmsg(3, 64, socket.MSG_CMSG_CLOEXEC)[0] == b"def"
