# SPDX-License-Identifier: Apache-2.0
"""recvmmsg, sendmmsg, preadv2 and pwritev2: limits, ends and flags."""

from __future__ import annotations

import ctypes
import errno
import socket

from tests.conformance.kit import (
    IoVec,
    MMsgHdr,
    MsgHdr,
    TimeSpec,
    buffers,
    c,
    each,
    fails,
    iovec,
    ok,
    pair,
    readable,
    receive,
)

RWF = {"HIPRI": 1, "DSYNC": 2, "SYNC": 4, "NOWAIT": 8, "APPEND": 16}


def _messages(count: int, size: int) -> tuple[ctypes.Array[MMsgHdr], list[object]]:
    """Messages of one part each, and what keeps their memory."""
    kept: list[object] = []
    headers = (MMsgHdr * count)()
    for header in headers:
        (part,) = buffers(size)
        vector = (IoVec * 1)(IoVec(ctypes.addressof(part), size))
        header.hdr = MsgHdr(iov=vector, iovlen=1)
        kept += [part, vector]
    return headers, kept


def recvmmsg_at_the_end() -> None:
    """The end of the stream is a message of nothing, as often as is asked for."""
    ends = pair()
    ends.a.sendall(b"abc")
    ends.a.shutdown(socket.SHUT_WR)
    headers, _kept = _messages(4, 2)
    assert ok("recvmmsg", ends.b.fileno(), headers, 4, 0, None) == 4
    assert [header.len for header in headers] == [2, 1, 0, 0]


def more_messages_than_there_may_be() -> None:
    """1024 of those sent at most, whatever is asked for."""
    ends = pair()
    headers, _kept = _messages(1100, 1)
    assert ok("sendmmsg", ends.a.fileno(), headers, 1100, 0) == 1024
    readable(ends.b)
    assert len(receive(ends.b, 1024)) == 1024
    ends.a.sendall(bytes(1100))
    readable(ends.b)
    wait = socket.MSG_DONTWAIT
    assert ok("recvmmsg", ends.b.fileno(), headers, 1100, wait, None) == 1100


def no_messages() -> None:
    ends = pair()
    headers, _kept = _messages(1, 1)
    assert c("recvmmsg", ends.b.fileno(), headers, 0, 0, None) == (0, 0)
    assert c("sendmmsg", ends.a.fileno(), headers, 0, 0) == (0, 0)


@each((0, 1_000_000_000), (0, -1), (-1, 0))
def recvmmsg_time_that_is_none(time: tuple[int, int]) -> None:
    ends = pair()
    headers, _kept = _messages(1, 1)
    limit = ctypes.byref(TimeSpec(*time))
    error = fails("recvmmsg", ends.b.fileno(), headers, 1, 0, limit)
    assert error == errno.EINVAL


def recvmmsg_tells_the_time_left() -> None:
    ends = pair()
    ends.a.sendall(b"x")
    readable(ends.b)
    headers, _kept = _messages(1, 1)
    limit = TimeSpec(5, 0)
    assert ok("recvmmsg", ends.b.fileno(), headers, 1, 0, ctypes.byref(limit)) == 1
    assert (limit.sec, limit.nsec) != (5, 0)
    assert 0 < limit.sec * 1_000_000_000 + limit.nsec < 5_000_000_000


@each(*RWF)
def flags_of_preadv2(name: str) -> None:
    ends = pair()
    ends.a.sendall(b"abc")
    readable(ends.b)
    (part,) = buffers(10)
    got = c("preadv2", ends.b.fileno(), iovec([part]), 1, -1, RWF[name])
    assert got == (3, 0)
    got = c("pwritev2", ends.b.fileno(), iovec([part], [3]), 1, -1, RWF[name])
    assert got == (3, 0)
    assert receive(ends.a, 3) == b"abc"


@each("preadv2", "pwritev2")
def arguments_of_preadv2(name: str) -> None:
    """What is wrong first is told."""
    ends = pair()
    fd = ends.b.fileno()
    vector = iovec(buffers(1))
    assert fails(name, fd, vector, 1, -1, 1 << 20) == errno.EOPNOTSUPP
    assert fails(name, fd, vector, 1, 5, 1 << 20) == errno.ESPIPE
    assert fails(name, fd, vector, 1, 0, 0) == errno.ESPIPE
    assert fails(name, fd, vector, 1, -2, 0) == errno.EINVAL
    assert fails(name, fd, vector, -1, -1, 0) == errno.EINVAL
    assert fails(name, fd, vector, -1, -1, 1 << 20) == errno.EINVAL
    assert c(name, fd, vector, 0, -1, 0) == (0, 0)
    assert c(name, fd, vector, 0, -1, 1 << 20) == (0, 0)
