# SPDX-License-Identifier: Apache-2.0
"""Pointers that lead nowhere: EFAULT, never a signal, and the connection goes on."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import socket
import tempfile
from collections.abc import Callable
from typing import Any

from tests.conformance.kit import (
    EPOLLET,
    EPOLLIN,
    EPOLLONESHOT,
    EPOLLOUT,
    Epoll,
    EpollEvent,
    IoVec,
    MMsgHdr,
    MsgHdr,
    Pair,
    PollFd,
    Skip,
    Task,
    assert_on_ring,
    buffers,
    c,
    each,
    fails,
    forked,
    iovec,
    libc,
    listener,
    message,
    ok,
    page_size,
    pair,
    pattern,
    readable,
    reap,
    receive,
    settings,
)

_NOWAIT = socket.MSG_DONTWAIT
_NONE, _READ, _BOTH = 0, 1, 3
_FIONREAD, _SIOCOUTQ = 0x541B, 0x5411


# --- memory that is not what it seems ---------------------------------------------


def _map(pages: int = 1) -> int:
    """Fresh private memory, with a page before and behind that cannot be used."""
    size = page_size()
    function = ctypes.CDLL(None).mmap
    function.restype = ctypes.c_void_p
    start: int = function(
        None, ctypes.c_size_t((pages + 2) * size), _NONE, 0x22, -1, ctypes.c_long(0)
    )
    ok("mprotect", ctypes.c_void_p(start + size), pages * size, _BOTH)
    return start + size


def _protected(content: bytes, protection: int) -> int:
    """A page that starts with content and can no longer be written, or read."""
    page = _map()
    ctypes.memmove(page, content, len(content))
    ok("mprotect", ctypes.c_void_p(page), page_size(), protection)
    return page


def _unmapped() -> int:
    page = _map()
    ok("munmap", ctypes.c_void_p(page), page_size())
    return page


def _truncated() -> int:
    """A page of a file that has become shorter: SIGBUS where it is touched."""
    with tempfile.TemporaryFile() as file:
        file.truncate(page_size())
        mapped = mmap.mmap(file.fileno(), page_size())
        view = (ctypes.c_char * page_size()).from_buffer(mapped)
        _kept.append(view)
        file.truncate(0)
    return ctypes.addressof(view)


_kept: list[Any] = []

# Each makes an address at which length bytes cannot be read.
_KINDS: dict[str, Callable[[int], int]] = {
    "null": lambda _length: 0,
    "one": lambda _length: 1,
    "last": lambda _length: (1 << 64) - 1,
    "kernel": lambda _length: 0xFFFF800000000000,
    "neither_half": lambda _length: 1 << 48,
    "unmapped": lambda _length: _unmapped(),
    "no_access": lambda _length: _protected(b"", _NONE),
    "truncated_file": lambda _length: _truncated(),
    "half": lambda length: _map() + page_size() - length // 2,
}
_OUT_KINDS: dict[str, Callable[[int], int]] = {
    **_KINDS,
    "read_only": lambda _length: _protected(b"", _READ),
}


# For arguments that may be left out.
_SOME_KINDS = {kind: make for kind, make in _KINDS.items() if kind != "null"}


def _pointer(value: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(value)


def _goes_on(ends: Pair) -> None:
    """Both directions still carry bytes by ring, and nothing else is under way."""
    for one, other in ((ends.a, ends.b), (ends.b, ends.a)):
        one.sendall(b"after")
        assert receive(other, 5) == b"after"
        assert c("recv", other.fileno(), buffers(1)[0], 1, _NOWAIT) == (
            -1,
            errno.EAGAIN,
        )
    assert_on_ring(ends.a)
    assert_on_ring(ends.b)


# --- buffers ------------------------------------------------------------------------


def _buffer_arguments(name: str, address: int, length: int) -> tuple[Any, ...]:
    """Arguments after the descriptor for a call with one buffer."""
    vector = (IoVec * 1)(IoVec(address, length))
    one, size = _pointer(address), ctypes.c_size_t(length)
    return {
        "read": (one, size),
        "write": (one, size),
        "recv": (one, size, 0),
        "send": (one, size, 0),
        "recvfrom": (one, size, 0, None, None),
        "sendto": (one, size, 0, None, 0),
        "readv": (vector, 1),
        "writev": (vector, 1),
        "preadv2": (vector, 1, -1, 0),
        "pwritev2": (vector, 1, -1, 0),
        "recvmsg": (ctypes.byref(message(vector)), 0),
        "sendmsg": (ctypes.byref(message(vector)), 0),
        "recvmmsg": ((MMsgHdr * 1)(MMsgHdr(message(vector))), 1, 0, None),
        "sendmmsg": ((MMsgHdr * 1)(MMsgHdr(message(vector))), 1, 0),
    }[name]


_READS = ("read", "recv", "recvfrom", "readv", "preadv2", "recvmsg", "recvmmsg")
_WRITES = ("write", "send", "sendto", "writev", "pwritev2", "sendmsg", "sendmmsg")


@each(*_READS)
def buffer_to_read_into(name: str) -> None:
    """EFAULT, and the bytes stay for the next call."""
    ends = pair()
    for kind, make in _OUT_KINDS.items():
        for length in (4, 300):
            data = pattern(length)
            ends.a.sendall(data)
            readable(ends.b)
            args = _buffer_arguments(name, make(length), length)
            assert fails(name, ends.b.fileno(), *args) == errno.EFAULT, kind
            assert receive(ends.b, length) == data
    _goes_on(ends)


@each(*_WRITES)
def buffer_to_write_from(name: str) -> None:
    """EFAULT, and nothing is sent."""
    ends = pair()
    for kind, make in _KINDS.items():
        for length in (4, 300):
            args = _buffer_arguments(name, make(length), length)
            assert fails(name, ends.a.fileno(), *args) == errno.EFAULT, kind
        ends.a.sendall(b"next")
        assert receive(ends.b, 4) == b"next"
    _goes_on(ends)


def buffers_of_all_sizes_that_end_at_a_hole() -> None:
    """One byte too many fails, and one less does not."""
    ends = pair()
    end = _map() + page_size()
    fd_in, fd_out = ends.b.fileno(), ends.a.fileno()
    for length in (*range(1, 300), 1000, 2000, 4000):
        start, one_more = _pointer(end - length), _pointer(end - length + 1)
        ctypes.memmove(end - length, pattern(length), length)
        assert fails("send", fd_out, one_more, length, 0) == errno.EFAULT
        assert ok("send", fd_out, start, length, 0) == length
        ctypes.memset(end - length, 0, length)
        readable(ends.b)
        assert fails("recv", fd_in, one_more, length, 0) == errno.EFAULT
        assert ok("recv", fd_in, start, length, 0) == length
        assert ctypes.string_at(end - length, length) == pattern(length)
    _goes_on(ends)


@each("no_access", "read_only", "null")
def good_part_before_a_bad_one(kind: str) -> None:
    """The attempt as a whole fails: nothing of it is sent, or taken."""
    ends = pair()
    (good,) = buffers(100)
    good.raw = pattern(100)
    bad = _OUT_KINDS[kind](100)
    vector = (IoVec * 2)(IoVec(ctypes.addressof(good), 100), IoVec(bad, 100))
    if kind != "read_only":
        assert fails("writev", ends.a.fileno(), vector, 2) == errno.EFAULT
    ends.a.sendall(pattern(200))
    readable(ends.b)
    assert fails("readv", ends.b.fileno(), vector, 2) == errno.EFAULT
    assert receive(ends.b, 200) == pattern(200)
    _goes_on(ends)


def bad_part_that_is_not_reached() -> None:
    """A buffer that no byte goes to may lie anywhere but in the kernel's half."""
    ends = pair()
    (good,) = buffers(4)
    for bad in (0, 8, _unmapped()):
        vector = (IoVec * 2)(IoVec(ctypes.addressof(good), 4), IoVec(bad, 100))
        ends.a.sendall(b"four")
        readable(ends.b)
        assert ok("readv", ends.b.fileno(), vector, 2) == 4
        assert good.raw == b"four"
    vector[1].base = 0xFFFF800000000000
    ends.a.sendall(b"four")
    readable(ends.b)
    assert fails("readv", ends.b.fileno(), vector, 2) == errno.EFAULT
    assert receive(ends.b, 4) == b"four"


def nothing_to_read_is_found_first() -> None:
    """EAGAIN, whatever the buffer; in the kernel's half it is EFAULT all the same."""
    ends = pair()
    fd = ends.b.fileno()
    for address in (0, 8, _unmapped()):
        result = c("recv", fd, _pointer(address), 10, _NOWAIT)
        assert result == (-1, errno.EAGAIN)
    assert fails("recv", fd, _pointer(1 << 63), 10, _NOWAIT) == errno.EFAULT
    ends.a.close()
    readable(ends.b)
    assert ok("recv", fd, None, 10, 0) == 0


def end_of_a_sleep() -> None:
    """A reader that sleeps wakes to find its buffer bad."""
    ends = pair()
    task = Task(fails, "recv", ends.b.fileno(), _pointer(8), 10, 0).until_asleep()
    ends.a.sendall(b"kept")
    assert task.result() == errno.EFAULT
    assert receive(ends.b, 4) == b"kept"
    _goes_on(ends)


def progress_beats_the_error() -> None:
    """What an earlier attempt of the same call took is its result."""
    ends = pair()
    hole = _map() + page_size()
    args = (ends.b.fileno(), _pointer(hole - 4), 8, socket.MSG_WAITALL)
    task = Task(c, "recv", *args)
    ends.a.sendall(b"abcd")
    task.until_asleep()
    ends.a.sendall(b"efgh")
    assert task.result() == (4, 0)
    assert ctypes.string_at(hole - 4, 4) == b"abcd"
    assert receive(ends.b, 4) == b"efgh"
    _goes_on(ends)


def large_write_that_runs_into_a_hole() -> None:
    """What was sent before is the result, and is a prefix; or nothing was sent."""
    ends = pair()
    size = 1 << 20
    start = _map(size // page_size())
    ctypes.memmove(start, pattern(size), size)
    reader = Task(_until_end, ends.b)
    result, error = c("send", ends.a.fileno(), _pointer(start), size + 1, 0)
    assert (result, error) == (-1, errno.EFAULT) or 0 < result <= size
    ends.a.sendall(b"after")
    ends.a.shutdown(socket.SHUT_WR)
    assert reader.result() == pattern(max(result, 0)) + b"after"


def _until_end(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(1 << 18):
        parts.append(part)
    return b"".join(parts)


def large_read_that_runs_into_a_hole() -> None:
    """No byte is lost or told twice, however far the call came."""
    ends = pair()
    size = 150_000
    writer = Task(ends.a.sendall, pattern(size))
    start = _map(16)
    room, done = 16 * page_size(), 0
    while done < size:
        result, error = c("recv", ends.b.fileno(), _pointer(start), size, 0)
        if result == -1:
            assert error == errno.EFAULT
            result = ok("recv", ends.b.fileno(), _pointer(start), room, 0)
        assert ctypes.string_at(start, result) == pattern(result, done)
        done += result
    writer.result()
    _goes_on(ends)


def peek_into_a_bad_buffer() -> None:
    ends = pair()
    ends.a.sendall(b"kept")
    readable(ends.b)
    args = (ends.b.fileno(), _pointer(8), 10, socket.MSG_PEEK)
    assert fails("recv", *args) == errno.EFAULT
    assert receive(ends.b, 4) == b"kept"


def thrown_away_bytes_need_no_buffer() -> None:
    """With MSG_TRUNC, TCP copies nothing."""
    ends = pair()
    ends.a.sendall(b"gone kept")
    readable(ends.b)
    assert ok("recv", ends.b.fileno(), None, 5, socket.MSG_TRUNC) == 5
    assert receive(ends.b, 4) == b"kept"


def faults_in_many_threads() -> None:
    """Each thread's bad pointers are its own affair."""

    def suffer(ends: Pair) -> None:
        page = _protected(b"", _READ)
        for turn in range(200):
            data = pattern(1 + turn)
            ends.a.sendall(data)
            readable(ends.b)
            args = (ends.b.fileno(), _pointer(page), 1 + turn, 0)
            assert fails("recv", *args) == errno.EFAULT
            assert receive(ends.b, len(data)) == data

    all_ends = [pair() for _ in range(4)]
    for task in [Task(suffer, ends) for ends in all_ends]:
        task.result()
    for ends in all_ends:
        _goes_on(ends)


# --- what calls read and write beside buffers ----------------------------------------


@each("readv", "writev", "preadv2", "pwritev2")
def vector(name: str) -> None:
    ends = pair()
    extra = (-1, 0) if name.startswith("p") else ()
    for kind, make in _KINDS.items():
        address = _pointer(make(2 * ctypes.sizeof(IoVec)))
        assert fails(name, ends.a.fileno(), address, 2, *extra) == errno.EFAULT, kind
    _goes_on(ends)


@each("recvmsg", "sendmsg")
def message_header(name: str) -> None:
    ends = pair()
    ends.a.sendall(b"kept")
    readable(ends.b)
    for kind, make in _KINDS.items():
        argument = _pointer(make(ctypes.sizeof(MsgHdr)))
        assert fails(name, ends.b.fileno(), argument, 0) == errno.EFAULT, kind
    assert receive(ends.b, 4) == b"kept"
    _goes_on(ends)


@each("recvmsg", "sendmsg")
def vector_of_a_message(name: str) -> None:
    ends = pair()
    ends.a.sendall(b"kept")
    readable(ends.b)
    for kind, make in _KINDS.items():
        header = MsgHdr(iovlen=2)
        address = _pointer(make(2 * ctypes.sizeof(IoVec)))
        header.iov = ctypes.cast(address, ctypes.POINTER(IoVec))
        argument = ctypes.byref(header)
        assert fails(name, ends.b.fileno(), argument, 0) == errno.EFAULT, kind
    assert receive(ends.b, 4) == b"kept"
    _goes_on(ends)


def header_that_cannot_be_written() -> None:
    """The kernel tells of it when the bytes are taken already."""
    ends = pair()
    (buffer,) = buffers(4)
    vector_ = iovec([buffer])
    ends.a.sendall(b"gone")
    readable(ends.b)
    page = _protected(bytes(message(vector_)), _READ)
    assert fails("recvmsg", ends.b.fileno(), _pointer(page), 0) == errno.EFAULT
    assert buffer.raw == b"gone"
    _goes_on(ends)


@each("recvmmsg", "sendmmsg")
def count_that_cannot_be_written(name: str) -> None:
    """The message has gone, and is not counted."""
    ends = pair()
    (buffer,) = buffers(4)
    vector_ = iovec([buffer])
    entry = bytes(MMsgHdr(message(vector_)))
    page = _protected(entry, _READ)
    if name == "sendmmsg":
        args = (ends.a.fileno(), _pointer(page), 1, 0)
        assert fails(name, *args) == errno.EFAULT
        assert receive(ends.b, 4) == buffer.raw
    else:
        ends.a.sendall(b"gone")
        readable(ends.b)
        args = (ends.b.fileno(), _pointer(page), 1, 0)
        assert fails(name, *args, None) == errno.EFAULT
        assert buffer.raw == b"gone"
    _goes_on(ends)


def second_message_is_bad() -> None:
    """The first one counts."""
    ends = pair()
    (buffer,) = buffers(4)
    vector_ = iovec([buffer])
    address = _map() + page_size() - ctypes.sizeof(MMsgHdr)
    first = MMsgHdr.from_address(address)
    first.hdr = message(vector_)
    assert ok("sendmmsg", ends.a.fileno(), _pointer(address), 2, 0) == 1
    assert receive(ends.b, 4) == buffer.raw
    assert first.len == 4
    _goes_on(ends)


def time_limit_of_recvmmsg() -> None:
    ends = pair()
    ends.a.sendall(b"kept")
    readable(ends.b)
    messages = (MMsgHdr * 1)(MMsgHdr(message(iovec(buffers(4)))))
    for kind, make in _SOME_KINDS.items():
        args = (ends.b.fileno(), messages, 1, 0, _pointer(make(16)))
        assert fails("recvmmsg", *args) == errno.EFAULT, kind
    assert receive(ends.b, 4) == b"kept"
    _goes_on(ends)


def address_length_of_recvfrom() -> None:
    """The bytes are taken before the kernel looks at it."""
    ends = pair()
    (buffer, name) = buffers(4, 64)
    for kind, make in _OUT_KINDS.items():
        ends.a.sendall(b"gone")
        readable(ends.b)
        args = (ends.b.fileno(), buffer, 4, 0, name, _pointer(make(4)))
        assert fails("recvfrom", *args) == errno.EFAULT, kind
        assert buffer.raw == b"gone"
        assert fails("recv", ends.b.fileno(), buffer, 4, _NOWAIT) == errno.EAGAIN
    _goes_on(ends)


def address_length_below_zero() -> None:
    ends = pair()
    (buffer, name) = buffers(4, 64)
    ends.a.sendall(b"gone")
    readable(ends.b)
    args = (ends.b.fileno(), buffer, 4, 0, name, ctypes.byref(ctypes.c_int(-1)))
    assert fails("recvfrom", *args) == errno.EINVAL
    _goes_on(ends)


def address_length_of_accept() -> None:
    ends = pair()
    (name,) = buffers(64)
    for kind, make in {**_SOME_KINDS, "read_only": _OUT_KINDS["read_only"]}.items():
        with listener() as listening, socket.socket() as other:
            other.connect(listening.getsockname())
            readable(listening)
            args = (listening.fileno(), name, _pointer(make(4)))
            assert fails("accept", *args) == errno.EFAULT, kind
    _goes_on(ends)


@each(_FIONREAD, _SIOCOUTQ)
def queue_lengths(request: int) -> None:
    ends = pair()
    for kind, make in _OUT_KINDS.items():
        args = (ends.a.fileno(), request, _pointer(make(4)))
        assert fails("ioctl", *args) == errno.EFAULT, kind
    _goes_on(ends)


def offset_of_sendfile() -> None:
    """One that cannot be read fails before, one that cannot be written after."""
    ends = pair()
    with tempfile.TemporaryFile() as file:
        file.write(b"0123456789")
        file.flush()
        args = (ends.a.fileno(), file.fileno())
        for kind, make in _SOME_KINDS.items():
            error = fails("sendfile", *args, _pointer(make(8)), 10)
            assert error == errno.EFAULT, kind
        _goes_on(ends)
        page = _protected(b"", _READ)
        assert fails("sendfile", *args, _pointer(page), 10) == errno.EFAULT
    assert receive(ends.b, 10) == b"0123456789"
    _goes_on(ends)


def option_values() -> None:
    ends = pair()
    for kind, make in _KINDS.items():
        address = _pointer(make(4))
        args = (ends.a.fileno(), socket.SOL_SOCKET, socket.SO_RCVLOWAT, address, 4)
        assert fails("setsockopt", *args) == errno.EFAULT, kind
    _goes_on(ends)


# --- waiting -------------------------------------------------------------------------


@each("poll", "ppoll")
def entries_of_poll(name: str) -> None:
    ends = pair()
    tail = (0,) if name == "poll" else (None, None)
    for kind, make in _KINDS.items():
        address = _pointer(make(2 * ctypes.sizeof(PollFd)))
        assert fails(name, address, 2, *tail) == errno.EFAULT, kind
    _goes_on(ends)


def entries_of_poll_that_cannot_be_written() -> None:
    ends = pair()
    entry = PollFd(ends.a.fileno(), select.POLLOUT, 0)
    page = _protected(bytes(entry), _READ)
    assert fails("poll", _pointer(page), 1, -1) == errno.EFAULT
    _goes_on(ends)


def poll_leaves_descriptors_and_events_alone() -> None:
    """Only revents is written."""
    ends = pair()
    entries = (PollFd * 100)(
        *(PollFd(ends.a.fileno(), select.POLLOUT, -1) for _ in range(100))
    )
    assert ok("poll", entries, 100, -1) == 100
    for entry in entries:
        assert entry.fd == ends.a.fileno()
        assert (entry.events, entry.revents) == (select.POLLOUT, select.POLLOUT)


def _bits(sock: socket.socket) -> Any:
    bits = (ctypes.c_uint64 * 16)()
    bits[sock.fileno() // 64] |= 1 << (sock.fileno() % 64)
    return bits


@each(0, 1, 2)
def sets_of_select(place: int) -> None:
    ends = pair()
    for kind, make in _SOME_KINDS.items():
        sets: list[Any] = [None, _bits(ends.a), None]
        sets[place] = _pointer(make(8))
        assert fails("select", 64, *sets, None) == errno.EFAULT, kind
        assert fails("pselect", 64, *sets, None, None) == errno.EFAULT, kind
    _goes_on(ends)


@each(0, 1, 2)
def sets_of_select_that_cannot_be_written(place: int) -> None:
    ends = pair()
    sets: list[Any] = [None, _bits(ends.a), None]
    sets[place] = _pointer(_protected(bytes(_bits(ends.a)), _READ))
    assert fails("select", 64, *sets, None) == errno.EFAULT
    _goes_on(ends)


@each("ppoll", "pselect", "epoll_pwait")
def signal_masks(name: str) -> None:
    """The mask is looked at even when there is no need to wait."""
    ends = pair()
    fd = ends.a.fileno()
    epoll = Epoll()
    epoll.add(ends.a, EPOLLOUT, 1)
    for kind, make in _SOME_KINDS.items():
        mask = _pointer(make(8))
        args: tuple[Any, ...] = {
            "ppoll": ((PollFd * 1)(PollFd(fd, select.POLLOUT, 0)), 1, None, mask),
            "pselect": (fd + 1, None, _bits(ends.a), None, None, mask),
            "epoll_pwait": (epoll.fd, (EpollEvent * 1)(), 1, -1, mask),
        }[name]
        assert fails(name, *args) == errno.EFAULT, kind
    _goes_on(ends)


@each("ADD", "MOD")
def event_of_epoll_ctl(name: str) -> None:
    ends = pair()
    epoll = Epoll()
    if name == "MOD":
        epoll.add(ends.a, EPOLLOUT, 7)
    for kind, make in _KINDS.items():
        address = _pointer(make(ctypes.sizeof(EpollEvent)))
        args = (epoll.fd, getattr(Epoll, name), ends.a.fileno(), address)
        assert fails("epoll_ctl", *args) == errno.EFAULT, kind
    assert epoll.wait(0) == ([(7, EPOLLOUT)] if name == "MOD" else [])
    _goes_on(ends)


@each("level", "edge", "once")
def events_of_epoll_wait(how: str) -> None:
    """What could not be told is told by the next call, edge or not."""
    ends = pair()
    epoll = Epoll()
    flag = {"level": 0, "edge": EPOLLET, "once": EPOLLONESHOT}[how]
    epoll.add(ends.b, EPOLLIN | flag, 5)
    assert epoll.wait(0) == []
    ends.a.sendall(b"kept")
    readable(ends.b)
    for kind, make in _OUT_KINDS.items():
        address = _pointer(make(ctypes.sizeof(EpollEvent)))
        for timeout in (-1, 0):
            args = (epoll.fd, address, 1, timeout)
            assert fails("epoll_wait", *args) == errno.EFAULT, kind
    assert epoll.wait() == [(5, EPOLLIN)]
    assert epoll.wait(0) == ([(5, EPOLLIN)] if how == "level" else [])
    assert receive(ends.b, 4) == b"kept"
    _goes_on(ends)


def event_that_comes_while_epoll_wait_waits() -> None:
    ends = pair()
    epoll = Epoll()
    epoll.add(ends.b, EPOLLIN | EPOLLET, 5)
    args = (epoll.fd, _pointer(8), 1, -1)
    task = Task(fails, "epoll_wait", *args)
    ends.a.sendall(b"kept")
    assert task.result() == errno.EFAULT
    assert epoll.wait() == [(5, EPOLLIN)]
    assert receive(ends.b, 4) == b"kept"


def room_for_one_of_two_events() -> None:
    """An array that ends at a hole holds what fits; the rest comes later."""
    first, second = pair(), pair()
    epoll = Epoll()
    epoll.add(first.b, EPOLLIN | EPOLLET, 1)
    epoll.add(second.b, EPOLLIN | EPOLLET, 2)
    for ends in (first, second):
        ends.a.sendall(b"x")
        readable(ends.b)
    address = _map() + page_size() - ctypes.sizeof(EpollEvent)
    seen = []
    for _ in range(2):
        assert ok("epoll_wait", epoll.fd, _pointer(address), 2, -1) == 1
        seen.append(EpollEvent.from_address(address).data)
    assert sorted(seen) == [1, 2]
    assert epoll.wait(0) == []


def time_limit_of_epoll_pwait2() -> None:
    if not hasattr(libc, "epoll_pwait2"):
        raise Skip("this libc has no epoll_pwait2")
    ends = pair()
    epoll = Epoll()
    epoll.add(ends.a, EPOLLOUT, 1)
    for kind, make in _SOME_KINDS.items():
        args = (epoll.fd, (EpollEvent * 1)(), 1, _pointer(make(16)), None)
        assert fails("epoll_pwait2", *args) == errno.EFAULT, kind
    _goes_on(ends)


# --- before and after the rings ------------------------------------------------------


@settings(KMAP_UPGRADE_AFTER="1000000")
def before_any_upgrade() -> None:
    """What the library looks at although the kernel carries the bytes."""
    ends = pair(upgraded=False)
    ends.a.sendall(b"kept" * 4)
    readable(ends.b)
    fd = ends.b.fileno()
    epoll = Epoll()
    epoll.add(ends.b, EPOLLIN, 1)
    (name,) = buffers(64)
    messages = (MMsgHdr * 1)(MMsgHdr(message(iovec(buffers(4)))))
    for kind, make in _SOME_KINDS.items():
        bad, bad_mask = _pointer(make(16)), _pointer(make(8))
        sets = [_bits(ends.b), None, None]
        calls: dict[str, tuple[Any, ...]] = {
            "recv": (fd, bad, 16, 0),
            "send": (fd, bad, 16, 0),
            "poll": (bad, 2, 0),
            "ppoll": ((PollFd * 1)(PollFd(fd, 1, 0)), 1, None, bad_mask),
            "select": (64, bad_mask, None, None, None),
            "pselect": (64, *sets, None, bad_mask),
            "epoll_ctl": (epoll.fd, Epoll.MOD, fd, bad),
            "epoll_wait": (epoll.fd, bad, 2, 0),
            "recvmmsg": (fd, messages, 1, 0, bad),
        }
        # libc looks at the time limits of ppoll, select and pselect by itself.
        if hasattr(libc, "epoll_pwait2"):
            calls["epoll_pwait2"] = (epoll.fd, (EpollEvent * 1)(), 1, bad, None)
        for call, args in calls.items():
            assert fails(call, *args) == errno.EFAULT, f"{call}, {kind}"
        with listener() as listening, socket.socket() as other:
            other.connect(listening.getsockname())
            readable(listening)
            args = (listening.fileno(), name, _pointer(make(4)))
            assert fails("accept", *args) == errno.EFAULT, kind
    page = _protected(bytes(PollFd(fd, select.POLLIN, 0)), _READ)
    assert fails("poll", _pointer(page), 1, 0) == errno.EFAULT
    assert receive(ends.b, 16) == b"kept" * 4


@each("read_only", "unmapped", "null")
def during_the_upgrade(kind: str) -> None:
    """Bad buffers all the way from the kernel to the ring."""
    ends = pair(upgraded=False)
    for turn in range(64):
        data = pattern(100, turn)
        for one, other in ((ends.a, ends.b), (ends.b, ends.a)):
            one.sendall(data)
            readable(other)
            address = _pointer(_OUT_KINDS[kind](100))
            assert fails("recv", other.fileno(), address, 100, 0) == errno.EFAULT
            if kind != "read_only":
                assert fails("send", one.fileno(), address, 100, 0) == errno.EFAULT
            assert receive(other, 100) == data
    _goes_on(ends)


def in_a_forked_child() -> None:
    ends = pair()

    def child() -> None:
        args = (ends.a.fileno(), _pointer(8), 10, 0)
        assert fails("send", *args) == errno.EFAULT
        ends.a.sendall(b"child")

    pid = forked(child)
    assert receive(ends.b, 5) == b"child"
    reap(pid)
    args = (ends.a.fileno(), _pointer(8), 10, 0)
    assert fails("send", *args) == errno.EFAULT
    os.write(ends.a.fileno(), b"parent")
    assert receive(ends.b, 6) == b"parent"
