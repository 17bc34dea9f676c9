# SPDX-License-Identifier: Apache-2.0
"""TCP sockets of a network namespace by sock_diag(7), with the kernel's byte counts.

Structures and numbers are those of linux/inet_diag.h, linux/sock_diag.h and
linux/tcp.h.  It takes no privilege within the caller's own namespace, and
CAP_SYS_ADMIN for another one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import threading
from collections.abc import Iterator

from kmap.procfs import TcpSocket
from kmap.wire import V4_MAPPED, Endpoint

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_NLM_F_REQUEST_DUMP = 0x1 | 0x100 | 0x200
_CLONE_NEWNET = 0x40000000
_INET_DIAG_INFO = 2
# Of TCP states: all but time-wait and new-request sockets, which nobody holds.
_STATES = 0xFFF & ~(1 << 6 | 1 << 12)
# In these the peer's FIN has come, which tcpi_bytes_received counts as a byte:
# close-wait, last-ack, closing.
_FIN_RECEIVED = frozenset({0x08, 0x09, 0x0B})

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_REQUEST = struct.Struct("=BBBxI48x")  # struct inet_diag_req_v2
# struct inet_diag_msg: family, state, ports, addresses, rqueue, wqueue, uid, inode
_MESSAGE = struct.Struct("=BBxx2s2s16s16s16xIIII")
_ATTRIBUTE = struct.Struct("=HH")  # struct rtattr
# struct tcp_info from tcpi_bytes_received on: it, notsent, sent, retransmitted
_INFO = struct.Struct("=128xQ8xI52xQQ")
_ERROR = struct.Struct("=i")  # the first field of struct nlmsgerr
_BUFFER = 1 << 18


def _tcp_info(raw: bytes, at: int, end: int) -> tuple[int, int, int, int] | None:
    while at + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(raw, at)
        if kind == _INET_DIAG_INFO and length >= _ATTRIBUTE.size + _INFO.size:
            received, notsent, sent, resent = _INFO.unpack_from(
                raw, at + _ATTRIBUTE.size
            )
            return received, notsent, sent, resent
        if length < _ATTRIBUTE.size:
            break
        at += (length + 3) & ~3
    return None


def _decode(raw: bytes, at: int, end: int) -> TcpSocket:
    family, state, lport, pport, laddr, paddr, rqueue, wqueue, uid, inode = (
        _MESSAGE.unpack_from(raw, at)
    )
    if family == socket.AF_INET:
        laddr, paddr = V4_MAPPED + laddr[:4], V4_MAPPED + paddr[:4]
    info = _tcp_info(raw, at + _MESSAGE.size, end)
    rx_bytes = tx_bytes = None
    if info is not None:
        received, notsent, sent, resent = info
        unread = rqueue
        if state in _FIN_RECEIVED:
            received -= 1
            unread = max(0, unread - 1)
        rx_bytes = max(0, received - unread)
        tx_bytes = max(0, sent - resent + notsent)
    return TcpSocket(
        inode,
        Endpoint(laddr, int.from_bytes(lport, "big")),
        Endpoint(paddr, int.from_bytes(pport, "big")),
        state,
        uid,
        rqueue,
        wqueue,
        rx_bytes,
        tx_bytes,
    )


def _dump(link: socket.socket, family: int) -> Iterator[TcpSocket]:
    request = _REQUEST.pack(
        family, socket.IPPROTO_TCP, 1 << (_INET_DIAG_INFO - 1), _STATES
    )
    link.sendto(
        _HEADER.pack(
            _HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 0, 0
        )
        + request,
        (0, 0),
    )
    while True:
        raw = link.recv(_BUFFER)
        at = 0
        while at + _HEADER.size <= len(raw):
            length, kind, _, _, _ = _HEADER.unpack_from(raw, at)
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                number = -_ERROR.unpack_from(raw, at + _HEADER.size)[0]
                raise OSError(number, os.strerror(number))
            if length < _HEADER.size:
                raise OSError(errno.EPROTO, "netlink message of no length")
            yield _decode(raw, at + _HEADER.size, at + length)
            at += (length + 3) & ~3


def _open() -> socket.socket:
    return socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG
    )


def _open_in(pid: int) -> socket.socket:
    """A socket in the network namespace of the process.

    A thread goes there, opens it, and ends: it never has to come back.
    """
    setns = ctypes.CDLL(None, use_errno=True).setns
    found: list[socket.socket] = []
    failed: list[OSError] = []

    def enter() -> None:
        try:
            fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                if setns(fd, _CLONE_NEWNET) != 0:
                    number = ctypes.get_errno()
                    raise OSError(number, os.strerror(number))
                found.append(_open())
            finally:
                os.close(fd)
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


def tcp_sockets(pid: int) -> list[TcpSocket]:
    """All TCP sockets of the network namespace that the process is in.

    Raises OSError where sock_diag is not to be had, or the process is gone.
    """
    own = os.stat("/proc/self/ns/net").st_ino == os.stat(f"/proc/{pid}/ns/net").st_ino
    with _open() if own else _open_in(pid) as link:
        found = list(_dump(link, socket.AF_INET))
        found.extend(_dump(link, socket.AF_INET6))
        return found
