# SPDX-License-Identifier: Apache-2.0
"""accept and connect: their flags, errors, signals and time limits."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import socket
import struct

from tests.conformance.kit import (
    Task,
    c,
    connected,
    each,
    expect,
    fails,
    handler,
    listener,
    ok,
    poll_one,
    upgrade,
)


def _full() -> tuple[socket.socket, list[socket.socket]]:
    """A listener that takes no more connections, and those that it took."""
    listening = listener(backlog=0)
    taken = []
    while True:
        sock = socket.socket()
        sock.setblocking(False)
        taken.append(sock)
        try:
            sock.connect(listening.getsockname())
        except BlockingIOError:
            if not poll_one(sock, select.POLLOUT, 100):
                return listening, taken


def accept_without_waiting() -> None:
    with listener() as listening:
        listening.setblocking(False)
        expect(errno.EAGAIN, listening.accept)
        client = socket.create_connection(listening.getsockname())
        assert poll_one(listening, select.POLLIN)
        server, _ = listening.accept()
        expect(errno.EAGAIN, listening.accept)
        client.close()
        server.close()


def accept_with_a_time_limit() -> None:
    with listener() as listening:
        limit = struct.pack("ll", 0, 30_000)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        assert fails("accept", listening.fileno(), None, None) == errno.EAGAIN


def accept_arguments() -> None:
    with listener() as listening:
        fd = listening.fileno()
        assert fails("accept4", fd, None, None, 1) == errno.EINVAL
        client = socket.create_connection(listening.getsockname())
        length = ctypes.c_uint32(4)
        name = ctypes.create_string_buffer(b"\xff" * 16, 16)
        accepted = ok("accept", fd, name, ctypes.byref(length))
        # The length is the name's own; what did not fit was left out.
        assert length.value == 16
        assert name.raw[:2] == struct.pack("H", socket.AF_INET)
        assert name.raw[4:] == b"\xff" * 12
        server = socket.socket(fileno=accepted)
        assert fails("accept", server.fileno(), None, None) == errno.EINVAL
        with socket.socket() as fresh:
            assert fails("accept", fresh.fileno(), None, None) == errno.EINVAL
        with socket.socket(type=socket.SOCK_DGRAM) as datagrams:
            number = datagrams.fileno()
            assert fails("accept", number, None, None) == errno.EOPNOTSUPP
        with open("/dev/null") as file:
            assert fails("accept", file.fileno(), None, None) == errno.ENOTSOCK
            assert fails("connect", file.fileno(), name, 16) == errno.ENOTSOCK
        client.close()
        server.close()


@each(False, True)
def accept_and_signals(restart: bool) -> None:
    with listener() as listening, handler(signal.SIGUSR1, restart=restart) as seen:
        main = os.getpid()

        def disturb() -> None:
            from tests.conformance.kit import until, until_asleep

            until_asleep(main)
            os.kill(main, signal.SIGUSR1)
            if restart:
                until(lambda: seen or True, "the handler")
                until_asleep(main)
                socket.create_connection(listening.getsockname()).close()

        task = Task(disturb)
        result, error = c("accept", listening.fileno(), None, None)
        task.result()
        if restart:
            assert error == 0
            os.close(result)
        else:
            assert error == errno.EINTR


def shutdown_of_a_listener_wakes_accept() -> None:
    with listener() as listening:
        task = Task(c, "accept", listening.fileno(), None, None).until_asleep()
        listening.shutdown(socket.SHUT_RD)
        assert task.result() == (-1, errno.EINVAL)
        listening.listen(1)
        upgrade(connected(listening))


def connect_while_connecting() -> None:
    listening, taken = _full()
    last = taken[-1]
    assert last.connect_ex(listening.getsockname()) == errno.EALREADY
    expect(errno.EAGAIN, last.recv, 1)
    expect(errno.EAGAIN, last.send, b"x")
    # One place becomes free, and then it goes on as any other.
    accepted = [listening.accept()[0] for _ in taken[:-1]]
    assert poll_one(last, select.POLLOUT)
    assert last.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    server, _ = listening.accept()
    last.setblocking(True)
    last.sendall(b"late")
    assert server.recv(10) == b"late"
    for sock in (*accepted, *taken, server, listening):
        sock.close()


def connect_with_a_time_limit() -> None:
    listening, taken = _full()
    with socket.socket() as sock:
        limit = struct.pack("ll", 0, 30_000)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        expect(errno.EINPROGRESS, sock.connect, listening.getsockname())
    for sock in (*taken, listening):
        sock.close()


def connect_and_a_signal() -> None:
    """EINTR, and the attempt goes on by itself."""
    listening, taken = _full()
    ip, port = listening.getsockname()
    name = struct.pack("=H", socket.AF_INET) + struct.pack("!H", port)
    name += socket.inet_aton(ip) + bytes(8)
    with handler(signal.SIGUSR1, restart=False), socket.socket() as sock:
        main = os.getpid()

        def disturb() -> None:
            from tests.conformance.kit import until_asleep

            until_asleep(main)
            os.kill(main, signal.SIGUSR1)

        task = Task(disturb)
        assert fails("connect", sock.fileno(), name, 16) == errno.EINTR
        task.result()
        sock.setblocking(False)
        assert fails("connect", sock.fileno(), name, 16) == errno.EALREADY
    for sock in (*taken, listening):
        sock.close()


def addresses_that_will_not_do() -> None:
    with socket.socket() as sock:
        # TEST-NET-1 is nobody's address here.
        expect(errno.EADDRNOTAVAIL, sock.bind, ("192.0.2.1", 0))
        v6 = struct.pack("=H", socket.AF_INET6) + bytes(26)
        assert fails("connect", sock.fileno(), v6, 28) == errno.EAFNOSUPPORT
        with listener() as listening:
            expect(errno.EADDRINUSE, sock.bind, listening.getsockname())
            ends = upgrade(connected(listening))
            expect(errno.EINVAL, ends.a.bind, ("127.0.0.1", 0))
            expect(errno.EINVAL, ends.b.listen)
            ends.close()
