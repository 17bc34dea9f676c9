# SPDX-License-Identifier: Apache-2.0
"""System calls by number, through libc's syscall()."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import select
import socket

from tests.conformance.kit import (
    EPOLLIN,
    Epoll,
    EpollEvent,
    PollFd,
    Skip,
    Task,
    assert_on_ring,
    buffers,
    c,
    expect,
    fails,
    iovec,
    message,
    ok,
    pair,
    ping_pong,
    readable,
    receive,
    upgrade,
)

_X86 = {
    "read": 0, "write": 1, "close": 3, "poll": 7, "ioctl": 16, "readv": 19,
    "writev": 20, "dup": 32, "sendto": 44, "recvfrom": 45, "sendmsg": 46,
    "recvmsg": 47, "shutdown": 48, "fcntl": 72, "gettid": 186, "epoll_ctl": 233,
    "epoll_wait": 232, "dup3": 292, "getpid": 39, "close_range": 436,
    "io_uring_setup": 425,
}  # fmt: skip
_ARM = {
    "read": 63, "write": 64, "close": 57, "ioctl": 29, "readv": 65, "writev": 66,
    "dup": 23, "sendto": 206, "recvfrom": 207, "sendmsg": 211, "recvmsg": 212,
    "shutdown": 210, "fcntl": 25, "gettid": 178, "epoll_ctl": 21, "dup3": 24,
    "getpid": 172, "close_range": 436, "io_uring_setup": 425,
}  # fmt: skip


def _number(name: str) -> int:
    table = {"x86_64": _X86, "aarch64": _ARM}.get(platform.machine(), {})
    if name not in table:
        raise Skip(f"{platform.machine()} has no number for {name} here")
    return table[name]


def _call(name: str, *args: object) -> int:
    return ok("syscall", _number(name), *args)


def reads_and_writes() -> None:
    ends = pair()
    (buffer,) = buffers(100)
    fd = ends.b.fileno()
    assert _call("write", ends.a.fileno(), b"one", 3) == 3
    assert _call("read", fd, buffer, 100) == 3
    assert buffer.raw[:3] == b"one"
    assert _call("sendto", ends.a.fileno(), b"two", 3, 0, None, 0) == 3
    assert _call("recvfrom", fd, buffer, 100, 0, None, None) == 3
    assert buffer.raw[:3] == b"two"
    buffer.raw = b"vector".ljust(100, b"\0")
    assert _call("writev", ends.a.fileno(), iovec([buffer], [6]), 1) == 6
    assert _call("readv", fd, iovec([buffer], [100]), 1) == 6
    header = message(iovec([buffer], [6]))
    assert _call("sendmsg", ends.a.fileno(), ctypes.byref(header), 0) == 6
    assert _call("recvmsg", fd, ctypes.byref(header), 0) == 6
    assert buffer.raw[:6] == b"vector"


def mixed_with_the_functions() -> None:
    """By number and by name in turns, one stream."""
    ends = pair()
    (buffer,) = buffers(2)
    for turn in range(50):
        _call("write", ends.a.fileno(), b"%2d" % turn, 2)
        ends.a.sendall(b"%2d" % turn)
        readable(ends.b)
        got = receive(ends.b, 2)
        assert _call("read", ends.b.fileno(), buffer, 2) == 2
        assert got == buffer.raw == b"%2d" % turn
    assert_on_ring(ends.a)


def upgrades_by_number_alone() -> None:
    """A program that makes all its calls by number upgrades or stays, and works."""
    ends = pair(upgraded=False)
    (buffer,) = buffers(10)
    for _ in range(100):
        for one, two in (ends, (ends.b, ends.a)):
            assert _call("write", one.fileno(), b"ball", 4) == 4
            assert _call("read", two.fileno(), buffer, 10) == 4
    upgrade(ends)


def blocked_by_number() -> None:
    ends = pair()
    (buffer,) = buffers(10)
    task = Task(_call, "read", ends.b.fileno(), buffer, 10).until_asleep()
    ends.a.sendall(b"x")
    assert task.result() == 1


def close_and_dup() -> None:
    ends = pair()
    copy = _call("dup", ends.b.fileno())
    assert _call("close", ends.b.detach()) == 0
    ends.a.sendall(b"x")
    assert os.read(copy, 10) == b"x"
    target = os.open("/dev/null", os.O_RDONLY)
    assert _call("dup3", copy, target, os.O_CLOEXEC) == target
    assert _call("close", copy) == 0
    os.write(target, b"y")
    assert ends.a.recv(10) == b"y"
    assert _call("close_range", target, target, 0) == 0
    assert ends.a.recv(10) == b""
    expect(errno.EBADF, os.read, target, 1)


def shutdown_by_number() -> None:
    ends = pair()
    assert _call("shutdown", ends.a.fileno(), socket.SHUT_WR) == 0
    assert ends.b.recv(10) == b""


def waits_by_number() -> None:
    ends, epoll = pair(), Epoll()
    event = EpollEvent(EPOLLIN, 9)
    args = (epoll.fd, 1, ends.b.fileno(), ctypes.byref(event))
    assert _call("epoll_ctl", *args) == 0
    ends.a.sendall(b"x")
    assert epoll.wait() == [(9, EPOLLIN)]
    entries = (PollFd * 1)(PollFd(ends.b.fileno(), select.POLLIN, 0))
    assert _call("poll", entries, 1, -1) == 1
    events = (EpollEvent * 4)()
    assert _call("epoll_wait", epoll.fd, events, 4, -1) == 1
    assert (events[0].data, events[0].events) == (9, EPOLLIN)
    count = ctypes.c_int()
    assert _call("ioctl", ends.b.fileno(), 0x541B, ctypes.byref(count)) == 0
    assert count.value == 1


def non_blocking_by_number() -> None:
    ends = pair()
    f_setfl = 4
    _call("fcntl", ends.b.fileno(), f_setfl, os.O_NONBLOCK)
    expect(errno.EAGAIN, ends.b.recv, 1)


def calls_that_are_not_ours() -> None:
    """Six arguments, results and errors go straight through."""
    import threading

    assert _call("getpid") == os.getpid()
    assert _call("gettid") == threading.get_native_id()
    assert fails("syscall", 99999) == errno.ENOSYS
    assert fails("syscall", _number("read"), -1, None, 0) == errno.EBADF
    assert fails("syscall", _number("write"), 1 << 20, b"x", 1) == errno.EBADF
    pair()
    assert _call("getpid") == os.getpid()


def io_uring_setup_reaches_the_kernel() -> None:
    """On the kernel: an error about the arguments, or that it may not be used."""
    result, error = c("syscall", _number("io_uring_setup"), 0, None)
    assert result == -1
    assert error in (errno.EINVAL, errno.EFAULT, errno.EPERM), errno.errorcode[error]


def errno_of_a_refused_call_by_number() -> None:
    ends = pair()
    ends.b.setblocking(False)
    (buffer,) = buffers(10)
    args = (ends.b.fileno(), buffer, 10)
    assert c("syscall", _number("read"), *args) == (-1, errno.EAGAIN)
    ends.b.setblocking(True)
    ping_pong(ends.a, ends.b, 2)
