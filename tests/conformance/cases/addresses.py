# SPDX-License-Identifier: Apache-2.0
"""Where a connection goes: all of these are local, and all of them upgrade."""

from __future__ import annotations

import contextlib
import socket

from tests.conformance.kit import (
    Skip,
    connected,
    each,
    far_pair,
    listener,
    no_delay,
    pair,
    ping_pong,
    upgrade,
)


def _ipv6() -> None:
    try:
        listener("::1").close()
    except OSError as error:
        raise Skip(f"no IPv6 on the loopback device: {error}") from error


@each("127.0.0.1", "127.0.0.2", "127.255.255.254")
def ipv4(host: str) -> None:
    ends = pair(host=host)
    assert ends.b.getsockname()[0] == host
    assert ends.a.getpeername()[0] == host
    assert ends.a.getsockname() == ends.b.getpeername()


def ipv6() -> None:
    _ipv6()
    ends = pair(host="::1")
    assert ends.a.getpeername()[:2] == ends.b.getsockname()[:2]
    assert ends.a.family == socket.AF_INET6


def ipv6_across_processes() -> None:
    _ipv6()
    for far_accepts in (False, True):
        sock, peer = far_pair(host="::1", far_accepts=far_accepts)
        sock.close()
        peer.finish()


@each("127.0.0.1", "127.0.0.3", "::1", "::ffff:127.0.0.1")
def to_a_dual_listener(host: str) -> None:
    """A listener on [::] sees an IPv4 client as a v4-mapped address."""
    _ipv6()
    with listener("::") as listening:
        ends = upgrade(connected(listening, host))
    name = ends.b.getpeername()[0]
    if host == "::1":
        assert name == "::1"
    else:
        assert name.startswith("::ffff:127.0.0.")


def to_a_listener_on_any_address() -> None:
    with listener("0.0.0.0") as listening:
        ends = upgrade(connected(listening, "127.0.0.5"))
    assert ends.b.getsockname()[0] == "127.0.0.5"


def connect_to_any_address() -> None:
    """0.0.0.0 as a target means this host."""
    with listener("0.0.0.0") as listening:
        upgrade(connected(listening, "0.0.0.0"))


def from_a_bound_address() -> None:
    """The connector chose its own address and port."""
    with listener() as listening:
        a = socket.socket()
        a.bind(("127.0.0.9", 0))
        a.connect(listening.getsockname())
        b, name = listening.accept()
    assert name == a.getsockname()
    assert name[0] == "127.0.0.9"
    from tests.conformance.kit import Pair

    upgrade(Pair(a, b))


def own_address_that_is_not_loopback() -> None:
    """An address of another device of this host is local too."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
            own = probe.getsockname()[0]
        except OSError as error:
            raise Skip(f"this host has only loopback addresses: {error}") from error
    upgrade(pair(upgraded=False, host=own))


def the_same_ports_on_two_addresses() -> None:
    """Two connections that differ in one address alone stay apart."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(listener("127.0.0.1"))
        port = first.getsockname()[1]
        second = socket.socket()
        stack.enter_context(second)
        second.bind(("127.0.0.2", port))
        second.listen()
        one, two = connected(first), connected(second)
    upgrade(one)
    upgrade(two)
    one.a.sendall(b"one")
    two.a.sendall(b"two")
    assert one.b.recv(10) == b"one"
    assert two.b.recv(10) == b"two"


def a_socket_connected_to_itself() -> None:
    """TCP's simultaneous open of one socket: it talks to itself, on the kernel."""
    sock = no_delay(socket.socket())
    sock.bind(("127.0.0.1", 0))
    sock.connect(sock.getsockname())
    for turn in range(100):
        sock.sendall(b"%d" % turn)
        assert sock.recv(10) == b"%d" % turn
    sock.shutdown(socket.SHUT_WR)
    assert sock.recv(1) == b""


def other_families_are_left_alone() -> None:
    for family, kind in (
        (socket.AF_UNIX, socket.SOCK_STREAM),
        (socket.AF_UNIX, socket.SOCK_DGRAM),
        (socket.AF_UNIX, socket.SOCK_SEQPACKET),
    ):
        one, two = socket.socketpair(family, kind)
        ping_pong(one, two, 20)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.bind(("127.0.0.1", 0))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as two:
            two.bind(("127.0.0.1", 0))
            two.sendto(b"hello", one.getsockname())
            assert one.recvfrom(10) == (b"hello", two.getsockname())


def many_accepts_from_one_listener() -> None:
    with listener(backlog=32) as listening:
        clients = [socket.create_connection(listening.getsockname()) for _ in range(16)]
        listening.setblocking(False)
        servers = {}
        while True:
            try:
                sock, name = listening.accept()
            except BlockingIOError:
                break
            servers[name] = sock
    assert len(servers) == 16
    from tests.conformance.kit import Pair

    for client in clients:
        server = servers[client.getsockname()]
        server.setblocking(True)
        upgrade(Pair(client, server))
