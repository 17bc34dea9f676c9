# SPDX-License-Identifier: Apache-2.0
"""What sock_diag says of the sockets of this process, against what they did."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

import pytest

from kmap import procfs, sockdiag
from kmap.procfs import TcpSocket
from tests.cli.peers import wait_until


@contextlib.contextmanager
def pair(host: str, family: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection."""
    with socket.create_server((host, 0), family=family) as listener:
        with socket.create_connection(listener.getsockname()[:2]) as connector:
            acceptor, _ = listener.accept()
            with acceptor:
                yield connector, acceptor


def seen(sock: socket.socket) -> TcpSocket:
    inode = os.fstat(sock.fileno()).st_ino
    (found,) = (s for s in sockdiag.tcp_sockets(os.getpid()) if s.inode == inode)
    return found


def counts(sock: socket.socket) -> tuple[int | None, int | None, int]:
    found = seen(sock)
    return found.rx_bytes, found.tx_bytes, found.rx_queue


@pytest.mark.parametrize(
    ("host", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)]
)
def test_bytes_are_counted_exactly(host: str, family: int) -> None:
    with pair(host, family) as (connector, acceptor):
        assert counts(connector) == counts(acceptor) == (0, 0, 0)
        connector.sendall(bytes(1000))
        wait_until(lambda: counts(acceptor)[2] == 1000, "it has arrived")
        assert counts(connector) == (0, 1000, 0)
        assert counts(acceptor) == (0, 0, 1000)
        assert len(acceptor.recv(400)) == 400
        assert counts(acceptor) == (400, 0, 600)
        # A FIN has a number in the stream; it is no byte.
        connector.shutdown(socket.SHUT_WR)
        wait_until(lambda: seen(acceptor).state == 0x08, "the end has arrived")
        assert counts(acceptor)[0] == 400
        assert len(acceptor.recv(1000)) == 600
        assert counts(acceptor)[0] == 1000
        assert acceptor.recv(1) == b""
        assert counts(acceptor)[0] == 1000
        assert counts(connector)[1] == 1000


def test_both_sources_agree() -> None:
    with pair("127.0.0.1", socket.AF_INET) as four, pair("::1", socket.AF_INET6) as six:
        inodes = {os.fstat(sock.fileno()).st_ino for sock in (*four, *six)}
        by_text = {s.inode: s for s in procfs.tcp_sockets(os.getpid()) or ()}
        by_netlink = {s.inode: s for s in sockdiag.tcp_sockets(os.getpid())}
        for inode in inodes:
            asked = by_netlink[inode]._replace(rx_bytes=None, tx_bytes=None)
            assert asked == by_text[inode]
            assert by_netlink[inode].rx_bytes == 0


def test_a_process_that_is_gone_is_an_error() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(OSError, match="No such"):
        sockdiag.tcp_sockets(child)
