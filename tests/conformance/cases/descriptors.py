# SPDX-License-Identifier: Apache-2.0
"""One connection behind several numbers, one number for several connections."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
import termios
from collections.abc import Callable

from tests.conformance.kit import (
    Epoll,
    Task,
    assert_on_ring,
    c,
    each,
    expect,
    fails,
    forked,
    listener,
    ok,
    pair,
    pattern,
    ping_pong,
    poll_one,
    readable,
    reap,
    receive,
    receive_pattern,
    send_until_full,
    until,
    upgrade,
)


def _dup(fd: int) -> int:
    return os.dup(fd)


def _dup2(fd: int) -> int:
    target = os.open("/dev/null", os.O_RDONLY)
    return ok("dup2", fd, target)


def _dup3(fd: int) -> int:
    target = os.open("/dev/null", os.O_RDONLY)
    assert ok("dup3", fd, target, os.O_CLOEXEC) == target
    assert fcntl.fcntl(target, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
    return target


def _f_dupfd(fd: int) -> int:
    copy = fcntl.fcntl(fd, fcntl.F_DUPFD, 100)
    assert copy >= 100
    assert fcntl.fcntl(copy, fcntl.F_GETFD) == 0
    return copy


def _f_dupfd_cloexec(fd: int) -> int:
    copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
    assert fcntl.fcntl(copy, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
    return copy


_DUPS = (_dup, _dup2, _dup3, _f_dupfd, _f_dupfd_cloexec)


@each(*_DUPS)
def both_numbers_work(duplicate: Callable[[int], int]) -> None:
    """Reads and writes through either number are one stream."""
    ends = pair()
    copy = duplicate(ends.b.fileno())
    ends.a.sendall(b"abcdef")
    readable(ends.b)
    assert os.read(copy, 3) == b"abc"
    assert ends.b.recv(3) == b"def"
    os.write(copy, b"12")
    ends.b.sendall(b"34")
    assert receive(ends.a, 4) == b"1234"
    os.close(copy)


@each(*_DUPS)
def close_of_the_first(duplicate: Callable[[int], int]) -> None:
    """The connection lives until the last number is closed."""
    ends = pair()
    copy = duplicate(ends.b.fileno())
    ends.b.close()
    ends.a.sendall(b"abc")
    assert os.read(copy, 10) == b"abc"
    os.write(copy, b"xyz")
    assert ends.a.recv(10) == b"xyz"
    assert poll_one(ends.a, select.POLLIN, 0) == 0
    os.close(copy)
    assert ends.a.recv(10) == b""


@each(*_DUPS)
def close_of_the_copy(duplicate: Callable[[int], int]) -> None:
    ends = pair()
    copy = duplicate(ends.b.fileno())
    os.close(copy)
    ping_pong(ends.a, ends.b, 3)
    assert_on_ring(ends.a)
    ends.b.close()
    assert ends.a.recv(10) == b""


@each(*_DUPS)
def duplicated_before_the_upgrade(duplicate: Callable[[int], int]) -> None:
    ends = pair(upgraded=False)
    copy = duplicate(ends.b.fileno())
    upgrade(ends)
    ends.a.sendall(b"abc")
    assert os.read(copy, 10) == b"abc"
    ends.b.close()
    os.write(copy, b"xyz")
    assert ends.a.recv(10) == b"xyz"
    os.close(copy)
    assert ends.a.recv(10) == b""


def dup2_over_an_upgraded_connection() -> None:
    """The old connection ends, the number belongs to the new one."""
    ends, other = pair(), pair()
    os.dup2(other.b.fileno(), ends.b.fileno())
    assert ends.a.recv(10) == b""
    other.a.sendall(b"new")
    assert ends.b.recv(10) == b"new"
    other.b.close()
    ends.b.sendall(b"still")
    assert other.a.recv(10) == b"still"


def dup2_of_a_file_over_an_upgraded_connection() -> None:
    ends = pair()
    reading, writing = os.pipe()
    fd = ends.b.fileno()
    os.dup2(reading, fd)
    os.write(writing, b"pipe")
    assert os.read(fd, 10) == b"pipe"
    assert ends.a.recv(10) == b""


def dup2_onto_itself() -> None:
    ends = pair()
    fd = ends.b.fileno()
    assert ok("dup2", fd, fd) == fd
    assert fails("dup3", fd, fd, 0) == errno.EINVAL
    ping_pong(ends.a, ends.b, 2)


def dup2_of_a_closed_number() -> None:
    ends = pair()
    closed = os.dup(ends.b.fileno())
    os.close(closed)
    assert fails("dup2", closed, ends.b.fileno()) == errno.EBADF
    ping_pong(ends.a, ends.b, 2)


def dup_gives_the_lowest_number() -> None:
    """The library holds no low number of its own."""
    probe = os.open("/dev/null", os.O_RDONLY)
    os.close(probe)
    ends = pair()
    reading, writing = os.pipe()
    low = sorted([ends.a.fileno(), ends.b.fileno(), reading, writing])
    os.close(reading)
    assert os.dup(writing) == reading
    assert low[-1] - low[0] <= 5
    assert low[0] >= probe


def number_is_used_again() -> None:
    """A closed number that a new socket gets has nothing of the old connection."""
    for _ in range(5):
        ends = pair()
        numbers = {ends.a.fileno(), ends.b.fileno()}
        ends.a.sendall(b"old bytes")
        readable(ends.b)
        ends.close()
        again = pair(upgraded=False)
        assert {again.a.fileno(), again.b.fileno()} & numbers
        again.a.sendall(b"new")
        assert again.b.recv(100) == b"new"
        upgrade(again)
        again.close()


def number_is_used_again_by_a_pipe() -> None:
    ends = pair()
    numbers = {ends.a.fileno(), ends.b.fileno()}
    ends.a.sendall(b"old bytes")
    readable(ends.b)
    ends.close()
    reading, writing = os.pipe()
    assert {reading, writing} & numbers
    os.write(writing, b"pipe")
    assert os.read(reading, 100) == b"pipe"
    os.set_blocking(reading, False)
    expect(errno.EAGAIN, os.read, reading, 1)
    assert poll_one(reading, select.POLLIN, 0) == 0


def number_closed_behind_the_library() -> None:
    """close_range and a raw close end the connection as close does."""
    for name, args in (("close_range", (0,)), ("syscall", ())):
        ends = pair()
        fd = ends.b.detach()
        if name == "close_range":
            assert c(name, fd, fd, *args) == (0, 0)
        else:
            assert c(name, 3, fd) == (0, 0)
        assert ends.a.recv(10) == b""
        again = socket.socketpair()
        again[0].sendall(b"x")
        assert again[1].recv(10) == b"x"


def close_range_of_many() -> None:
    many = [pair() for _ in range(4)]
    numbers = sorted(e.b.detach() for e in many)
    assert ok("close_range", numbers[0], numbers[0], 0) == 0
    for e in many:
        fd = e.a.fileno()
        assert fd not in numbers
    for fd in numbers[1:]:
        assert ok("close_range", fd, fd, 0) == 0
    for e in many:
        assert e.a.recv(1) == b""


def close_range_to_the_top_spares_the_rest() -> None:
    """A program that closes all it did not open keeps working connections below."""
    ends = pair()
    top = max(ends.a.fileno(), ends.b.fileno())
    assert ok("close_range", top + 1, 0xFFFFFFFF, 0) == 0
    ping_pong(ends.a, ends.b, 5)
    task = Task(ends.b.recv, 10).until_asleep()
    ends.a.sendall(b"x")
    assert task.result() == b"x"
    epoll = Epoll()
    epoll.add(ends.b, select.EPOLLIN, 9)
    waiting = Task(epoll.wait).until_asleep()
    ends.a.sendall(b"y")
    assert waiting.result() == [(9, select.EPOLLIN)]


def close_every_other_number() -> None:
    """The loop of old daemons: close(3..1023) one by one, but not its own."""
    ends = pair()
    mine = {ends.a.fileno(), ends.b.fileno()}
    for fd in range(3, 1024):
        if fd not in mine:
            c("close", fd)
    ping_pong(ends.a, ends.b, 5)
    again = pair()
    ping_pong(again.a, again.b, 5)


def closed_twice() -> None:
    ends = pair()
    fd = ends.b.detach()
    os.close(fd)
    expect(errno.EBADF, os.close, fd)


def _by_fcntl(sock: socket.socket, on: bool) -> None:
    flags = fcntl.fcntl(sock, fcntl.F_GETFL)
    flags = flags | os.O_NONBLOCK if on else flags & ~os.O_NONBLOCK
    fcntl.fcntl(sock, fcntl.F_SETFL, flags)


def _by_ioctl(sock: socket.socket, on: bool) -> None:
    fcntl.ioctl(sock, termios.FIONBIO, struct.pack("i", on))


def _by_a_duplicate(sock: socket.socket, on: bool) -> None:
    copy = os.dup(sock.fileno())
    os.set_blocking(copy, not on)
    os.close(copy)


def _by_a_child(sock: socket.socket, on: bool) -> None:
    reap(forked(lambda: os.set_blocking(sock.fileno(), not on)))


@each(_by_fcntl, _by_ioctl, _by_a_duplicate, _by_a_child)
def non_blocking_mode(change: Callable[[socket.socket, bool], None]) -> None:
    """However it is changed, it is seen by the next call."""
    ends = pair()
    for _ in range(2):
        change(ends.b, True)
        assert fcntl.fcntl(ends.b, fcntl.F_GETFL) & os.O_NONBLOCK
        expect(errno.EAGAIN, ends.b.recv, 1)
        expect(errno.EAGAIN, os.read, ends.b.fileno(), 1)
        change(ends.b, False)
        assert not fcntl.fcntl(ends.b, fcntl.F_GETFL) & os.O_NONBLOCK
        task = Task(os.read, ends.b.fileno(), 1).until_asleep()
        ends.a.sendall(b"x")
        assert task.result() == b"x"


def status_flags_of_both_ends() -> None:
    ends = pair()
    for sock in ends:
        flags = fcntl.fcntl(sock, fcntl.F_GETFL)
        assert flags & os.O_ACCMODE == os.O_RDWR
        assert fcntl.fcntl(sock, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
        ok("fcntl", sock.fileno(), fcntl.F_SETFD, 0)
        assert fcntl.fcntl(sock, fcntl.F_GETFD) == 0


@each(0, socket.SOCK_NONBLOCK, socket.SOCK_CLOEXEC,
      socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)  # fmt: skip
def accept4_flags(flags: int) -> None:
    import ctypes

    with listener() as listening:
        a = socket.create_connection(listening.getsockname())
        name = (ctypes.c_char * 16)()
        length = ctypes.c_uint32(16)
        fd = ok("accept4", listening.fileno(), name, ctypes.byref(length), flags)
    assert length.value == 16
    assert int.from_bytes(name.raw[2:4], "big") == a.getsockname()[1]
    b = socket.socket(fileno=fd)
    assert bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK) == bool(
        flags & socket.SOCK_NONBLOCK
    )
    assert bool(fcntl.fcntl(fd, fcntl.F_GETFD)) == bool(flags & socket.SOCK_CLOEXEC)
    b.setblocking(True)
    ping_pong(a, b)
    assert_on_ring(b)


def names_are_unchanged() -> None:
    ends = pair(upgraded=False)
    names = [(s.getsockname(), s.getpeername()) for s in ends]
    upgrade(ends)
    assert [(s.getsockname(), s.getpeername()) for s in ends] == names
    assert names[0] == names[1][::-1]
    ends.b.close()
    assert ends.a.recv(1) == b""
    assert ends.a.getsockname() == names[0][0]


def options_are_unchanged() -> None:
    ends = pair()
    for sock in ends:
        get = sock.getsockopt
        assert get(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_STREAM
        assert get(socket.SOL_SOCKET, socket.SO_DOMAIN) == socket.AF_INET
        assert get(socket.SOL_SOCKET, socket.SO_PROTOCOL) == socket.IPPROTO_TCP
        assert get(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 0
        assert get(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        assert get(socket.SOL_SOCKET, socket.SO_SNDBUF) > 0
        assert get(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        assert len(get(socket.IPPROTO_TCP, socket.TCP_INFO, 104)) == 104
        for level, option in (
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            (socket.IPPROTO_TCP, socket.TCP_NODELAY),
            (socket.IPPROTO_TCP, socket.TCP_QUICKACK),
        ):
            for value in (0, 1):
                sock.setsockopt(level, option, value)
                assert bool(get(level, option)) == bool(value)
    ping_pong(ends.a, ends.b, 2)


def option_errors() -> None:
    import ctypes

    ends = pair()
    fd = ends.a.fileno()
    value, length = ctypes.c_int(), ctypes.c_uint32(4)
    args = (ctypes.byref(value), ctypes.byref(length))
    assert fails("getsockopt", fd, 1, 9999, *args) == errno.ENOPROTOOPT
    assert fails("getsockopt", fd, 6, 9999, *args) == errno.ENOPROTOOPT
    assert fails("getsockopt", fd, 9999, 1, *args) == errno.EOPNOTSUPP
    assert fails("setsockopt", fd, 1, 9999, ctypes.byref(value), 4) == errno.ENOPROTOOPT
    assert fails("getsockopt", fd, 1, 4, ctypes.c_void_p(8), ctypes.c_void_p(8)) == 14
    ping_pong(ends.a, ends.b, 2)


def connect_and_listen_on_a_connection() -> None:
    ends = pair()
    expect(errno.EISCONN, ends.a.connect, ends.a.getpeername())
    expect(errno.EINVAL, ends.a.listen, 5)
    expect(errno.EINVAL, ends.a.accept)
    expect(errno.EINVAL, ends.a.bind, ("127.0.0.1", 0))
    ping_pong(ends.a, ends.b, 2)


def disconnect_by_af_unspec() -> None:
    """connect(AF_UNSPEC) resets the connection; the socket can connect again."""
    ends = pair()
    address = struct.pack("=H14x", socket.AF_UNSPEC)
    assert ok("connect", ends.a.fileno(), address, 16) == 0
    expect(errno.ECONNRESET, ends.b.recv, 10)
    expect(errno.ENOTCONN, ends.a.getpeername)
    expect(errno.ECONNRESET, ends.a.recv, 10)
    expect(errno.ENOTCONN, ends.a.recv, 10)
    with listener() as listening:
        ends.a.connect(listening.getsockname())
        b, _ = listening.accept()
    ends.a.sendall(b"again")
    assert receive(b, 5) == b"again"
    b.sendall(b"back")
    assert receive(ends.a, 4) == b"back"


def fstat_is_a_socket() -> None:
    import stat

    ends = pair(upgraded=False)
    before = [os.fstat(s.fileno()).st_ino for s in ends]
    upgrade(ends)
    for sock, inode in zip(ends, before, strict=True):
        info = os.fstat(sock.fileno())
        assert stat.S_ISSOCK(info.st_mode)
        assert info.st_ino == inode
        assert os.readlink(f"/proc/self/fd/{sock.fileno()}") == f"socket:[{inode}]"


def non_blocking_connect() -> None:
    """EINPROGRESS, POLLOUT, SO_ERROR; then upgrade as any other."""
    with listener() as listening:
        a = socket.socket()
        a.setblocking(False)
        error = a.connect_ex(listening.getsockname())
        assert error in (0, errno.EINPROGRESS)
        assert poll_one(a, select.POLLOUT) == select.POLLOUT
        assert a.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        b, _ = listening.accept()
    a.setblocking(True)
    ping_pong(a, b)
    assert_on_ring(a)


def refused_connect() -> None:
    with listener() as listening:
        address = listening.getsockname()
    a = socket.socket()
    expect(errno.ECONNREFUSED, a.connect, address)
    b = socket.socket()
    b.setblocking(False)
    b.connect_ex(address)
    until(lambda: poll_one(b, select.POLLOUT, 0) & select.POLLERR, "refused")
    assert b.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED


def unconnected_calls() -> None:
    a = socket.socket()
    expect(errno.ENOTCONN, a.recv, 1)
    expect(errno.EPIPE, a.send, b"x", socket.MSG_NOSIGNAL)
    expect(errno.ENOTCONN, a.shutdown, socket.SHUT_WR)
    assert poll_one(a, select.POLLIN | select.POLLOUT, 0) & select.POLLHUP


def fcntl_commands_that_are_not_ours() -> None:
    ends = pair()
    fd = ends.a.fileno()
    assert ok("fcntl", fd, fcntl.F_SETOWN, os.getpid()) == 0
    assert ok("fcntl", fd, fcntl.F_GETOWN) == os.getpid()
    assert fails("fcntl", fd, 9999, 0) == errno.EINVAL
    assert fails("fcntl", fd, fcntl.F_DUPFD, -1) == errno.EINVAL


def many_connections_in_one_process() -> None:
    many = [pair() for _ in range(40)]
    for index, ends in enumerate(many):
        ends.a.sendall(pattern(100, index))
    for index, ends in enumerate(many):
        receive_pattern(ends.b, 100, index)
    for ends in many[::2]:
        ends.close()
    for ends in many[1::2]:
        ping_pong(ends.a, ends.b, 2)
    for ends in many[1::2]:
        ends.a.close()
        assert ends.b.recv(1) == b""


def full_at_the_limit_of_descriptors() -> None:
    """With no free number the program's own calls fail with EMFILE, no others."""
    import resource

    made = [pair(upgraded=False) for _ in range(2)]
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    fillers = []
    while (copy := c("dup", 0))[0] >= 0:
        fillers.append(copy[0])
    assert copy == (-1, errno.EMFILE)
    assert fillers[-1] == 63
    for ends in made:
        ping_pong(ends.a, ends.b)
    for ends in made:
        sent = send_until_full(ends.a)
        receive_pattern(ends.b, sent)
    os.close(fillers.pop(0))
    assert c("dup", 0)[0] >= 0
    assert c("dup", 0) == (-1, errno.EMFILE)
