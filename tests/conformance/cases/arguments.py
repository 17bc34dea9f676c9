# SPDX-License-Identifier: Apache-2.0
"""Odd arguments: zero lengths, too many parts, pointers that lead nowhere."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket

from tests.conformance.kit import (
    BAD_POINTER,
    IoVec,
    MsgHdr,
    PollFd,
    buffers,
    c,
    each,
    expect,
    fails,
    iovec,
    message,
    ok,
    page_size,
    pair,
    pattern,
    readable,
    receive,
)

_NOWAIT = socket.MSG_DONTWAIT


def zero_length_writes() -> None:
    """They send nothing and succeed, also when a byte would not fit."""
    ends = pair()
    fd = ends.a.fileno()
    assert os.write(fd, b"") == 0
    assert ok("send", fd, b"", 0, 0) == 0
    assert ok("send", fd, None, 0, 0) == 0
    assert os.writev(fd, [b"", b""]) == 0
    assert ends.a.sendmsg([]) == 0
    ends.a.sendall(b"x")
    assert ends.b.recv(10) == b"x"


def zero_length_recv_with_data() -> None:
    ends = pair()
    ends.a.sendall(b"x")
    readable(ends.b)
    fd = ends.b.fileno()
    (buffer,) = buffers(1)
    assert ok("recv", fd, buffer, 0, 0) == 0
    assert ok("read", fd, buffer, 0) == 0
    assert ok("recv", fd, None, 0, 0) == 0
    assert os.readv(fd, [bytearray(0), bytearray(0)]) == 0
    assert ends.b.recv(10) == b"x"


def zero_length_read_without_data() -> None:
    """read(2) of nothing returns at once; so does readv of empty parts."""
    ends = pair()
    fd = ends.b.fileno()
    (buffer,) = buffers(1)
    assert ok("read", fd, buffer, 0) == 0
    assert os.readv(fd, [bytearray(0)]) == 0


def zero_length_recv_non_blocking_without_data() -> None:
    ends = pair()
    ends.b.setblocking(False)
    (buffer,) = buffers(1)
    assert c("recv", ends.b.fileno(), buffer, 0, 0) == (-1, errno.EAGAIN)


def zero_length_at_the_end() -> None:
    ends = pair()
    ends.a.close()
    readable(ends.b)
    (buffer,) = buffers(1)
    assert ok("recv", ends.b.fileno(), buffer, 0, 0) == 0


@each("writev", "readv")
def too_many_parts(name: str) -> None:
    ends = pair()
    parts = buffers(*([1] * 1025))
    assert fails(name, ends.a.fileno(), iovec(parts), 1025) == errno.EINVAL
    assert fails(name, ends.a.fileno(), iovec(parts), -1) == errno.EINVAL


@each("sendmsg", "recvmsg")
def too_many_parts_in_a_message(name: str) -> None:
    ends = pair()
    header = message(iovec(buffers(*([1] * 1025))))
    error = fails(name, ends.a.fileno(), ctypes.byref(header), _NOWAIT)
    assert error == errno.EMSGSIZE


def negative_part_length() -> None:
    ends = pair()
    (buffer,) = buffers(8)
    vector = (IoVec * 2)(
        IoVec(ctypes.addressof(buffer), 4),
        IoVec(ctypes.addressof(buffer), (1 << 64) - 1),
    )
    assert fails("writev", ends.a.fileno(), vector, 2) == errno.EINVAL
    assert fails("readv", ends.b.fileno(), vector, 2) == errno.EINVAL
    header = message(vector)
    assert fails("sendmsg", ends.a.fileno(), ctypes.byref(header), 0) == errno.EINVAL


def bad_pointer_in_send() -> None:
    """EFAULT, and the connection goes on."""
    ends = pair()
    fd = ends.a.fileno()
    assert fails("send", fd, BAD_POINTER, 10, 0) == errno.EFAULT
    assert fails("write", fd, BAD_POINTER, 10) == errno.EFAULT
    assert fails("send", fd, None, 10, 0) == errno.EFAULT
    assert fails("writev", fd, BAD_POINTER, 1) == errno.EFAULT
    assert fails("sendmsg", fd, BAD_POINTER, 0) == errno.EFAULT
    ends.a.sendall(b"still here")
    assert ends.b.recv(100) == b"still here"


def bad_pointer_in_recv() -> None:
    """EFAULT, and the bytes stay for the next call."""
    ends = pair()
    ends.a.sendall(b"kept")
    readable(ends.b)
    fd = ends.b.fileno()
    assert fails("recv", fd, BAD_POINTER, 10, 0) == errno.EFAULT
    assert fails("read", fd, BAD_POINTER, 10) == errno.EFAULT
    assert fails("readv", fd, BAD_POINTER, 1) == errno.EFAULT
    assert fails("recvmsg", fd, BAD_POINTER, 0) == errno.EFAULT
    assert ends.b.recv(100) == b"kept"


def bad_pointer_in_a_part() -> None:
    ends = pair()
    (buffer,) = buffers(4)
    vector = (IoVec * 1)(IoVec(8, 4))
    assert fails("writev", ends.a.fileno(), vector, 1) == errno.EFAULT
    header = message(vector)
    assert fails("sendmsg", ends.a.fileno(), ctypes.byref(header), 0) == errno.EFAULT
    ends.a.sendall(b"abcd")
    readable(ends.b)
    assert fails("readv", ends.b.fileno(), vector, 1) == errno.EFAULT
    assert fails("recvmsg", ends.b.fileno(), ctypes.byref(header), 0) == errno.EFAULT
    assert ok("recv", ends.b.fileno(), buffer, 4, 0) == 4
    assert buffer.raw == b"abcd"


def read_only_buffer_in_recv() -> None:
    """A page that may not be written gives EFAULT, not a signal."""
    ends = pair()
    page = mmap.mmap(-1, page_size())
    view = (ctypes.c_char * page_size()).from_buffer(page)
    address = ctypes.addressof(view)
    ok("mprotect", ctypes.c_void_p(address), page_size(), 1)
    ends.a.sendall(b"kept")
    readable(ends.b)
    error = fails("recv", ends.b.fileno(), ctypes.c_void_p(address), 10, 0)
    assert error == errno.EFAULT
    assert ends.b.recv(10) == b"kept"
    ok("mprotect", ctypes.c_void_p(address), page_size(), 3)


def buffer_that_ends_at_a_hole() -> None:
    """A send whose buffer runs into an unmapped page sends nothing more than is there.

    Either EFAULT or a short count; what arrives is a prefix.
    """
    ends = pair()
    size = page_size()
    area = ctypes.CDLL(None).mmap
    area.restype = ctypes.c_void_p
    base = area(None, ctypes.c_size_t(2 * size), 3, 0x22, -1, ctypes.c_long(0))
    ok("munmap", ctypes.c_void_p(base + size), size)
    ctypes.memmove(base + size - 100, pattern(100), 100)
    result, error = c(
        "send", ends.a.fileno(), ctypes.c_void_p(base + size - 100), 200, 0
    )
    assert (result, error) == (-1, errno.EFAULT) or 0 < result <= 100
    if result > 0:
        assert receive(ends.b, result) == pattern(result)
    ends.a.sendall(b"after")
    assert receive(ends.b, 5) == b"after"


def huge_length_in_recv() -> None:
    """The length may be far more than the buffer when little arrives."""
    ends = pair()
    (buffer,) = buffers(4096)
    ends.a.sendall(b"few")
    readable(ends.b)
    assert ok("read", ends.b.fileno(), buffer, (1 << 31) - 1) == 3
    ends.a.sendall(b"few")
    readable(ends.b)
    assert ok("recv", ends.b.fileno(), buffer, (1 << 63) - 1, 0) == 3
    assert buffer.raw[:3] == b"few"


@each("read", "write", "recv", "send", "readv", "writev", "recvmsg", "sendmsg")
def closed_descriptor(name: str) -> None:
    """EBADF after close."""
    ends = pair()
    fd = ends.b.fileno()
    ends.b.close()
    (buffer,) = buffers(8)
    vector = iovec([buffer])
    header = message(vector)
    args = {
        "read": (buffer, 8),
        "write": (buffer, 8),
        "recv": (buffer, 8, 0),
        "send": (buffer, 8, 0),
        "readv": (vector, 1),
        "writev": (vector, 1),
        "recvmsg": (ctypes.byref(header), 0),
        "sendmsg": (ctypes.byref(header), 0),
    }[name]
    assert fails(name, fd, *args) == errno.EBADF
    assert fails(name, -1, *args) == errno.EBADF
    assert fails(name, 1 << 20, *args) == errno.EBADF


def address_in_sendto_is_ignored() -> None:
    """On a connected TCP socket the address of sendto means nothing."""
    ends = pair()
    assert ends.a.sendto(b"hello", ("127.0.0.1", 9)) == 5
    assert ends.b.recv(10) == b"hello"


def unknown_control_data_is_refused() -> None:
    """EINVAL, and nothing is sent."""
    ends = pair()
    unknown = [(socket.SOL_SOCKET, 99, b"\0\0\0\0")]
    expect(errno.EINVAL, ends.a.sendmsg, [b"lost"], unknown)
    ends.a.sendall(b"x")
    assert ends.b.recv(10) == b"x"


def rights_in_sendmsg_are_ignored() -> None:
    """SCM_RIGHTS means nothing on TCP; the bytes go, no descriptor does."""
    ends = pair()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, b"\0\0\0\0")]
    assert ends.a.sendmsg([b"sent"], rights) == 4
    assert ends.b.recvmsg(10, 100)[:3] == (b"sent", [], 0)


def name_in_recvmsg() -> None:
    """TCP leaves the name alone and its length 0."""
    ends = pair()
    ends.a.sendall(b"x")
    (buffer,) = buffers(8)
    name = ctypes.create_string_buffer(b"\xaa" * 64, 64)
    header = MsgHdr(iov=iovec([buffer]), iovlen=1, name=ctypes.addressof(name))
    header.namelen = 64
    assert ok("recvmsg", ends.b.fileno(), ctypes.byref(header), 0) == 1
    assert header.namelen == 0
    assert name.raw == b"\xaa" * 64


def poll_with_a_bad_pointer() -> None:
    ends = pair()
    assert fails("poll", BAD_POINTER, 1, 0) == errno.EFAULT
    entries = (PollFd * 1)(PollFd(ends.a.fileno(), 4, 0))
    assert ok("poll", entries, 1, 0) == 1


def epoll_wait_arguments() -> None:
    """Maxevents of 0 or less, and an fd that is no epoll set."""
    ends = pair()
    epfd = ok("epoll_create1", 0)
    (buffer,) = buffers(64)
    assert fails("epoll_wait", epfd, buffer, 0, 0) == errno.EINVAL
    assert fails("epoll_wait", epfd, buffer, -1, 0) == errno.EINVAL
    assert fails("epoll_wait", ends.a.fileno(), buffer, 1, 0) == errno.EINVAL
    assert fails("epoll_wait", -1, buffer, 1, 0) == errno.EBADF


def epoll_wait_with_a_bad_pointer() -> None:
    ends = pair()
    epfd = ok("epoll_create1", 0)
    event = (ctypes.c_char * 16)()
    event[0] = b"\x04"
    ok("epoll_ctl", epfd, 1, ends.a.fileno(), event)
    assert fails("epoll_wait", epfd, BAD_POINTER, 1, 0) == errno.EFAULT


def epoll_ctl_errors() -> None:
    ends = pair()
    epfd = ok("epoll_create1", 0)
    event = (ctypes.c_char * 16)()
    event[0] = b"\x01"
    fd = ends.a.fileno()
    assert fails("epoll_ctl", epfd, 3, fd, event) == errno.ENOENT
    assert fails("epoll_ctl", epfd, 2, fd, None) == errno.ENOENT
    assert fails("epoll_ctl", epfd, 1, fd, BAD_POINTER) == errno.EFAULT
    assert fails("epoll_ctl", epfd, 1, fd, None) == errno.EFAULT
    assert fails("epoll_ctl", epfd, 9, fd, event) == errno.EINVAL
    assert fails("epoll_ctl", fd, 1, fd, event) == errno.EINVAL
    assert fails("epoll_ctl", fd, 1, epfd, event) == errno.EINVAL
    assert fails("epoll_ctl", epfd, 1, epfd, event) == errno.EINVAL
    assert fails("epoll_ctl", epfd, 1, 1 << 20, event) == errno.EBADF
    assert ok("epoll_ctl", epfd, 1, fd, event) == 0
    assert fails("epoll_ctl", epfd, 1, fd, event) == errno.EEXIST
    assert ok("epoll_ctl", epfd, 2, fd, None) == 0
    assert fails("epoll_ctl", epfd, 2, fd, None) == errno.ENOENT
