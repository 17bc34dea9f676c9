# SPDX-License-Identifier: Apache-2.0
"""Socket options and requests, set and read on a connection that is on its rings."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import termios

from tests.conformance.kit import (
    ROUNDS,
    Task,
    assert_on_ring,
    c,
    connected,
    each,
    expect,
    forked,
    listener,
    number,
    pair,
    pattern,
    ping_pong,
    poll_one,
    readable,
    reap,
    receive,
    receive_pattern,
    until,
    upgrade,
)

TCP, SOCKET = socket.IPPROTO_TCP, socket.SOL_SOCKET
SO_ZEROCOPY, SO_PEEK_OFF, SO_TIMESTAMPNS, SO_ATTACH_FILTER = 60, 42, 35, 26
TCP_ULP, TCP_INQ, TCP_ZEROCOPY_RECEIVE, TCP_REPAIR = 31, 36, 35, 19
MSG_ZEROCOPY = 0x4000000
SIOCATMARK = 0x8905
FIOASYNC = 0x5452


def _refused(
    error: int, sock: socket.socket, level: int, name: int, value: int | bytes
) -> bool:
    """Sets an option that a kernel may not have, and then says this; whether it did."""
    try:
        sock.setsockopt(level, name, value)
    except OSError as raised:
        if raised.errno != error:
            raise
        return True
    return False


@each(
    (SOCKET, socket.SO_TYPE, socket.SOCK_STREAM),
    (SOCKET, socket.SO_DOMAIN, socket.AF_INET),
    (SOCKET, socket.SO_PROTOCOL, socket.IPPROTO_TCP),
    (SOCKET, socket.SO_ACCEPTCONN, 0),
    (SOCKET, socket.SO_ERROR, 0),
    (TCP, socket.TCP_NODELAY, 1),
)
def values_that_are_known(option: tuple[int, int, int]) -> None:
    ends = pair()
    level, name, value = option
    assert ends.a.getsockopt(level, name) == value
    assert ends.b.getsockopt(level, name) == value


@each(
    (SOCKET, socket.SO_KEEPALIVE, 1),
    (SOCKET, socket.SO_OOBINLINE, 1),
    (SOCKET, socket.SO_PRIORITY, 3),
    (SOCKET, socket.SO_RCVLOWAT, 77),
    (TCP, socket.TCP_NODELAY, 0),
    (TCP, socket.TCP_CORK, 1),
    (TCP, socket.TCP_QUICKACK, 0),
    (TCP, socket.TCP_KEEPIDLE, 77),
    (TCP, socket.TCP_KEEPINTVL, 7),
    (TCP, socket.TCP_KEEPCNT, 3),
    (TCP, socket.TCP_USER_TIMEOUT, 7000),
    (TCP, socket.TCP_NOTSENT_LOWAT, 9999),
    (TCP, socket.TCP_LINGER2, 7),
    (socket.IPPROTO_IP, socket.IP_TOS, 8),
    (socket.IPPROTO_IP, socket.IP_TTL, 77),
)
def values_that_are_kept(option: tuple[int, int, int]) -> None:
    """What is set is read again, and the bytes go on."""
    ends = pair()
    level, name, value = option
    ends.a.setsockopt(level, name, value)
    assert ends.a.getsockopt(level, name) == value
    ends.a.sendall(b"there")
    ends.b.sendall(bytes(100))
    assert receive(ends.b, 5) == b"there"
    assert receive(ends.a, 100) == bytes(100)


def _corked(sock: socket.socket) -> int:
    return sock.getsockopt(TCP, socket.TCP_CORK)


def cork_around_each_answer() -> None:
    """As servers do it; whenever it is read, it is what was set last."""
    ends = pair()
    for turn in range(20):
        ends.a.setsockopt(TCP, socket.TCP_CORK, 1)
        ends.a.sendall(pattern(100))
        if turn % 3 == 1:
            assert _corked(ends.a) == 1
        ends.a.sendall(pattern(50, 100))
        ends.a.setsockopt(TCP, socket.TCP_CORK, 0)
        assert receive(ends.b, 150) == pattern(150)
        if turn % 3 == 2:
            assert _corked(ends.a) == 0
        assert _corked(ends.b) == 0
    assert_on_ring(ends.a)


@each("here", "there", "urgent", "shutdown")
def cork_when_the_stream_goes_by_the_kernel(why: str) -> None:
    for on in (0, 1):
        ends = pair()
        for value in (0, 1, on):
            ends.a.setsockopt(TCP, socket.TCP_CORK, value)
        ends.a.sendall(b"abc")
        if why == "urgent":
            ends.a.send(b"!", socket.MSG_OOB)
        elif why == "shutdown":
            ends.a.shutdown(socket.SHUT_WR)
        else:
            end = ends.a if why == "here" else ends.b
            end.setsockopt(SOCKET, SO_TIMESTAMPNS, 1)
        if why != "shutdown":
            ends.a.sendall(b"def")
        assert _corked(ends.a) == on
        for value in (1, 0):
            ends.a.setsockopt(TCP, socket.TCP_CORK, value)
            assert _corked(ends.a) == value
        expected = b"abc" if why == "shutdown" else b"abcdef"
        assert receive(ends.b, len(expected)) == expected


def cork_of_a_forked_child() -> None:
    """It is the connection's, whoever sets it."""
    ends = pair()
    for value in (0, 1, 0, 1):

        def change(to: int = value) -> None:
            ends.a.setsockopt(TCP, socket.TCP_CORK, to)

        reap(forked(change))
        assert _corked(ends.a) == value
        ends.a.setsockopt(TCP, socket.TCP_CORK, 1 - value)
        ends.a.sendall(b"abc")

        def child(expected: int = 1 - value) -> None:
            assert _corked(ends.a) == expected

        reap(forked(child))
        ends.a.setsockopt(TCP, socket.TCP_CORK, 0)
        assert receive(ends.b, 3) == b"abc"


def cork_of_a_program_that_is_given_the_connection() -> None:
    ends = pair()
    for value in (0, 1):
        ends.a.setsockopt(TCP, socket.TCP_CORK, value)
    code = (
        "import socket, sys; given = socket.socket(fileno=int(sys.argv[1])); "
        "print(given.getsockopt(socket.IPPROTO_TCP, socket.TCP_CORK))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(ends.a.fileno())],
        pass_fds=[ends.a.fileno()],
        stdout=subprocess.PIPE,
        check=True,
    )
    assert told.stdout == b"1\n"
    ends.a.sendall(b"abc")
    ends.a.setsockopt(TCP, socket.TCP_CORK, 0)
    assert receive(ends.b, 3) == b"abc"


def cork_that_is_older_than_the_ring() -> None:
    """What the kernel has held back goes when it is switched off."""
    ends = pair(upgraded=False)
    ends.a.setsockopt(TCP, socket.TCP_CORK, 1)
    ends.a.sendall(b"abc")
    for _ in range(ROUNDS):
        ends.b.sendall(b"x")
        assert ends.a.recv(1) == b"x"
    ends.a.sendall(b"def")
    ends.a.setsockopt(TCP, socket.TCP_CORK, 0)
    info = ends.a.getsockopt(TCP, socket.TCP_INFO, 148)
    assert struct.unpack_from("I", info, 144) == (0,)  # tcpi_notsent_bytes
    assert receive(ends.b, 6) == b"abcdef"
    upgrade(ends)


def cork_in_a_signal_handler() -> None:
    ends = pair()
    ends.a.setsockopt(TCP, socket.TCP_CORK, 0)
    turns: list[int] = []

    def turn(*_: object) -> None:
        turns.append(len(turns) % 2)
        ends.a.setsockopt(TCP, socket.TCP_CORK, turns[-1])

    before = signal.signal(signal.SIGALRM, turn)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        for _ in range(2000):
            ends.a.sendall(pattern(1000))
            assert receive(ends.b, 1000) == pattern(1000)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert turns
    assert _corked(ends.a) == turns[-1]


def cork_with_bad_arguments() -> None:
    ends = pair()
    for turn in (0, 1):
        ends.a.setsockopt(TCP, socket.TCP_CORK, turn)
        fd, name = number(ends.a), socket.TCP_CORK
        value = ctypes.c_int(1 - turn)
        assert c("setsockopt", fd, TCP, name, 0, 4)[1] == errno.EFAULT
        assert c("setsockopt", fd, TCP, name, 1 << 63, 4)[1] == errno.EFAULT
        for length in (0, 3, -1):
            _, error = c("setsockopt", fd, TCP, name, ctypes.byref(value), length)
            assert error == errno.EINVAL, length
        assert _corked(ends.a) == turn
        assert c("getsockopt", fd, TCP, name, 0, 0)[1] == errno.EFAULT
    ends.a.setsockopt(TCP, socket.TCP_CORK, 0)
    # Anything but zero is on, and more than an int may be told.
    ends.a.setsockopt(TCP, socket.TCP_CORK, struct.pack("qq", 77, 0))
    assert _corked(ends.a) == 1


def unknown_option() -> None:
    ends = pair()
    expect(errno.ENOPROTOOPT, ends.a.setsockopt, SOCKET, 9999, 1)
    expect(errno.ENOPROTOOPT, ends.a.getsockopt, TCP, 9999)
    expect(errno.EINVAL, ends.a.setsockopt, SOCKET, socket.SO_RCVLOWAT, b"")
    expect(errno.EINVAL, ends.a.setsockopt, SOCKET, socket.SO_RCVTIMEO, b"xx")
    assert_on_ring(ends.a)


def tcp_info_of_a_connection() -> None:
    """The state is the connection's; counts of bytes and packets are the kernel's."""
    ends = pair()
    assert ends.a.getsockopt(TCP, socket.TCP_INFO, 1)[0] == 1  # ESTABLISHED
    ends.a.shutdown(socket.SHUT_WR)
    assert ends.b.recv(1) == b""
    assert ends.b.getsockopt(TCP, socket.TCP_INFO, 1)[0] == 8  # CLOSE_WAIT


def time_limits_are_read_again() -> None:
    ends = pair()
    for name in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        ends.a.setsockopt(SOCKET, name, struct.pack("ll", 3, 500_000))
        assert ends.a.getsockopt(SOCKET, name, 16) == struct.pack("ll", 3, 500_000)
        expect(errno.EDOM, ends.a.setsockopt, SOCKET, name, struct.pack("ll", 1, -1))


def low_water_mark_of_nothing() -> None:
    """It means one."""
    ends = pair()
    ends.b.setsockopt(SOCKET, socket.SO_RCVLOWAT, 0)
    assert ends.b.getsockopt(SOCKET, socket.SO_RCVLOWAT) == 1
    ends.a.sendall(b"x")
    readable(ends.b)
    assert ends.b.recv(10) == b"x"


def low_water_mark_and_peek() -> None:
    """A peek waits for the mark too."""
    ends = pair()
    ends.b.setsockopt(SOCKET, socket.SO_RCVLOWAT, 4)
    ends.a.sendall(b"abc")
    task = Task(ends.b.recv, 10, socket.MSG_PEEK).until_asleep()
    ends.a.sendall(b"def")
    assert task.result() == b"abcdef"
    assert ends.b.recv(10) == b"abcdef"


def tls_after_the_upgrade() -> None:
    """Set by both, used, or refused as by a kernel without it: never half of it."""
    ends = pair()
    # Without keys bytes go as they are.
    _refused(errno.ENOENT, ends.a, TCP, TCP_ULP, b"tls")
    ping_pong(ends.a, ends.b, 5)


def tls_before_the_upgrade() -> None:
    with listener() as listening:
        ends = connected(listening)
    _refused(errno.ENOENT, ends.a, TCP, TCP_ULP, b"tls")
    ping_pong(ends.a, ends.b, 5)


@each(False, True)
def zero_copy_sends_are_completed(upgraded: bool) -> None:
    """Each MSG_ZEROCOPY send is told of on the error queue."""
    with listener() as listening:
        ends = connected(listening)
    if upgraded:
        upgrade(ends)
    ends.a.setsockopt(SOCKET, SO_ZEROCOPY, 1)
    assert ends.a.getsockopt(SOCKET, SO_ZEROCOPY) == 1
    assert ends.a.send(pattern(20_000), MSG_ZEROCOPY) == 20_000
    receive_pattern(ends.b, 20_000)
    assert poll_one(ends.a, 0) & select.POLLERR
    _, control, flags, _ = ends.a.recvmsg(10, 100, socket.MSG_ERRQUEUE)
    assert flags & socket.MSG_ERRQUEUE
    assert len(control) == 1
    ping_pong(ends.a, ends.b, 10)


@each(False, True)
def timestamps_of_what_arrives(upgraded: bool) -> None:
    """SO_TIMESTAMPNS: each message has one."""
    with listener() as listening:
        ends = connected(listening)
    if upgraded:
        upgrade(ends)
    ends.b.setsockopt(SOCKET, SO_TIMESTAMPNS, 1)

    def kinds() -> list[tuple[int, int]]:
        ends.a.sendall(b"x")
        data, control, _, _ = ends.b.recvmsg(10, 100)
        assert data == b"x"
        ends.b.sendall(data)
        assert ends.a.recv(10) == data
        return [item[:2] for item in control]

    # The kernel begins to take the time of packets a little later.
    until(kinds, "the first time")
    for _ in range(40):
        assert kinds() == [(SOCKET, SO_TIMESTAMPNS)]


@each(False, True)
def packet_filter(upgraded: bool) -> None:
    """One that lets everything pass, then traffic."""
    with listener() as listening:
        ends = connected(listening)
    if upgraded:
        upgrade(ends)
    program = ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, 0xFFFFFFFF))
    ends.b.setsockopt(
        SOCKET,
        SO_ATTACH_FILTER,
        struct.pack("@HP", 1, ctypes.addressof(program)),
    )
    ping_pong(ends.a, ends.b)


@each("fcntl", "ioctl", "fcntl upgraded", "ioctl upgraded")
def signal_driven_input(how: str) -> None:
    """O_ASYNC: SIGIO for each arrival."""
    with listener() as listening:
        ends = connected(listening)
    if how.endswith("upgraded"):
        upgrade(ends)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
    fcntl.fcntl(ends.b, fcntl.F_SETOWN, os.getpid())
    if how.startswith("ioctl"):
        fcntl.ioctl(ends.b, FIOASYNC, struct.pack("i", 1))
    else:
        flags = fcntl.fcntl(ends.b, fcntl.F_GETFL)
        fcntl.fcntl(ends.b, fcntl.F_SETFL, flags | 0o20000)
    for turn in range(40):
        ends.a.sendall(bytes([turn]))
        assert signal.sigtimedwait([signal.SIGIO], 8), "no SIGIO"
        readable(ends.b)
        while signal.sigtimedwait([signal.SIGIO], 0):
            pass
        assert ends.b.recv(10) == bytes([turn])
        ends.b.sendall(b"x")
        assert ends.a.recv(10) == b"x"
        while signal.sigtimedwait([signal.SIGIO], 0):
            pass


@each(False, True)
def peek_with_an_offset(upgraded: bool) -> None:
    """SO_PEEK_OFF moves on with each peek, where the kernel has it for TCP."""
    with listener() as listening:
        ends = connected(listening)
    if upgraded:
        upgrade(ends)
    if _refused(errno.EOPNOTSUPP, ends.b, SOCKET, SO_PEEK_OFF, 0):
        ping_pong(ends.a, ends.b)
        return
    ping_pong(ends.a, ends.b)
    ends.a.sendall(b"abcdef")
    readable(ends.b)
    assert ends.b.recv(2, socket.MSG_PEEK) == b"ab"
    assert ends.b.recv(2, socket.MSG_PEEK) == b"cd"
    assert ends.b.recv(10) == b"abcdef"


@each(False, True)
def queue_length_in_control_data(upgraded: bool) -> None:
    """TCP_INQ: each read says what is left, or the option is refused."""
    with listener() as listening:
        ends = connected(listening)
    if upgraded:
        upgrade(ends)
    if _refused(errno.ENOPROTOOPT, ends.b, TCP, TCP_INQ, 1):
        ping_pong(ends.a, ends.b)
        return
    ping_pong(ends.a, ends.b)
    ends.a.sendall(b"abcdef")
    readable(ends.b)
    _, control, _, _ = ends.b.recvmsg(4, 100)
    assert [(level, kind) for level, kind, _ in control] == [(TCP, TCP_INQ)]
    assert struct.unpack("i", control[0][2]) == (2,)
    assert ends.b.recv(2) == b"ef"


def where_the_urgent_byte_is() -> None:
    """SIOCATMARK is true when all bytes before it were read, and not sooner."""
    ends = pair()
    ends.a.sendall(b"abc")
    ends.a.send(b"!", socket.MSG_OOB)
    ends.a.sendall(b"def")
    assert poll_one(ends.b, select.POLLPRI) & select.POLLPRI
    marks = []
    for _ in range(3):
        answer = fcntl.ioctl(ends.b, SIOCATMARK, struct.pack("i", 9))
        marks.append(struct.unpack("i", answer)[0])
        assert len(ends.b.recv(1)) == 1
    answer = fcntl.ioctl(ends.b, SIOCATMARK, struct.pack("i", 9))
    assert (*marks, struct.unpack("i", answer)[0]) == (0, 0, 0, 1)
    assert ends.b.recv(10) == b"def"


def a_read_ends_at_the_urgent_byte() -> None:
    ends = pair()
    ends.a.sendall(b"abc")
    ends.a.send(b"!", socket.MSG_OOB)
    ends.a.sendall(b"def")
    assert poll_one(ends.b, select.POLLPRI) & select.POLLPRI
    assert ends.b.recv(100) == b"abc"
    assert ends.b.recv(1, socket.MSG_OOB) == b"!"
    assert ends.b.recv(100) == b"def"


def urgent_byte_in_line() -> None:
    """SO_OOBINLINE: it is part of the stream, and the read before it ends there."""
    ends = pair()
    ends.b.setsockopt(SOCKET, socket.SO_OOBINLINE, 1)
    ends.a.sendall(b"abc")
    ends.a.send(b"!", socket.MSG_OOB)
    ends.a.sendall(b"def")
    assert poll_one(ends.b, select.POLLPRI) & select.POLLPRI
    assert ends.b.recv(100) == b"abc"
    assert receive(ends.b, 4) == b"!def"


def urgent_data_signals() -> None:
    """SIGURG for the owner of the socket."""
    ends = pair()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGURG])
    fcntl.fcntl(ends.b, fcntl.F_SETOWN, os.getpid())
    ends.a.send(b"!", socket.MSG_OOB)
    assert signal.sigtimedwait([signal.SIGURG], 8), "no SIGURG"
    assert ends.b.recv(1, socket.MSG_OOB) == b"!"


def peek_and_waitall() -> None:
    """A peek of all waits for all, and leaves it."""
    ends = pair()
    ends.a.sendall(b"abc")
    both = socket.MSG_PEEK | socket.MSG_WAITALL
    task = Task(ends.b.recv, 6, both).until_asleep()
    ends.a.sendall(b"d")
    task.until_asleep()
    ends.a.sendall(b"efg")
    assert task.result() == b"abcdef"
    assert ends.b.recv(10) == b"abcdefg"


def peek_and_waitall_at_the_end() -> None:
    ends = pair()
    ends.a.sendall(b"abc")
    both = socket.MSG_PEEK | socket.MSG_WAITALL
    task = Task(ends.b.recv, 6, both).until_asleep()
    ends.a.shutdown(socket.SHUT_WR)
    assert task.result() == b"abc"
    assert ends.b.recv(10) == b"abc"
    assert ends.b.recv(10, both) == b""


def repair_of_an_upgraded_connection() -> None:
    """TCP_REPAIR is refused, or nothing is lost by going in and out."""
    ends = pair()
    if not _refused(errno.EPERM, ends.a, TCP, TCP_REPAIR, 1):
        ends.a.setsockopt(TCP, TCP_REPAIR, -1)
    ping_pong(ends.a, ends.b, 5)


def receive_by_mapping() -> None:
    """TCP_ZEROCOPY_RECEIVE is refused, or leaves to recv what it did not map."""
    ends = pair()
    ends.a.sendall(b"abcdef")
    readable(ends.b)
    # Its end is looked after by somebody, as it is in any program.
    task = Task(ends.a.recv, 10).until_asleep()
    asked = ctypes.create_string_buffer(64)
    length = ctypes.c_uint32(64)
    name = TCP_ZEROCOPY_RECEIVE
    _, error = c("getsockopt", number(ends.b), TCP, name, asked, ctypes.byref(length))
    assert error in (0, errno.ENOPROTOOPT, errno.EINVAL)
    assert ends.b.recv(10) == b"abcdef"
    ends.b.sendall(b"x")
    assert task.result() == b"x"


def window_size_is_no_request_of_sockets() -> None:
    ends = pair()
    expect(errno.ENOTTY, fcntl.ioctl, ends.a, termios.TIOCGWINSZ, bytes(8))
