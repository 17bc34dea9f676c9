# SPDX-License-Identifier: Apache-2.0
"""sendfile, splice and stdio streams."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from tests.conformance.kit import (
    Task,
    assert_on_ring,
    c,
    each,
    fails,
    libc,
    ok,
    pair,
    pattern,
    ping_pong,
    poll_one,
    readable,
    receive,
    receive_pattern,
    send_until_full,
)


@contextmanager
def _file(size: int) -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        file.write(pattern(size))
        file.flush()
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        yield file.fileno()


@each("sendfile", "sendfile64")
def sendfile_moves_the_file_offset(name: str) -> None:
    ends = pair()
    with _file(10000) as file:
        assert ok(name, ends.a.fileno(), file, None, 4000) == 4000
        assert os.lseek(file, 0, os.SEEK_CUR) == 4000
        assert ok(name, ends.a.fileno(), file, None, 100000) == 6000
        assert ok(name, ends.a.fileno(), file, None, 100) == 0
    receive_pattern(ends.b, 10000)


def sendfile_with_an_offset() -> None:
    """The offset given is used and counted up, the file's own stays."""
    ends = pair()
    offset = ctypes.c_long(1000)
    with _file(10000) as file:
        args = (ends.a.fileno(), file, ctypes.byref(offset))
        assert ok("sendfile", *args, 2000) == 2000
        assert offset.value == 3000
        assert os.lseek(file, 0, os.SEEK_CUR) == 0
        receive_pattern(ends.b, 2000, 1000)
        offset.value = 9999
        assert ok("sendfile", *args, 100) == 1
        assert offset.value == 10000
        receive_pattern(ends.b, 1, 9999)


def sendfile_of_megabytes() -> None:
    ends = pair()
    size = 6 << 20
    with _file(size) as file:
        task = Task(receive_pattern, ends.b, size)
        done = 0
        while done < size:
            done += os.sendfile(ends.a.fileno(), file, done, size - done)
        task.result()


def sendfile_without_blocking() -> None:
    ends = pair()
    ends.a.setblocking(False)
    size = 32 << 20
    with _file(1 << 20) as file:
        done = 0
        while done < size:
            try:
                start = done % (1 << 20)
                done += os.sendfile(ends.a.fileno(), file, start, (1 << 20) - start)
            except BlockingIOError:
                break
    assert 0 < done < size
    assert poll_one(ends.a, select.POLLOUT, 0) == 0
    for start in range(0, done, 1 << 20):
        receive_pattern(ends.b, min(1 << 20, done - start))


def sendfile_between_sends() -> None:
    """nginx: a header by writev, the body by sendfile."""
    ends = pair()
    with _file(5000) as file:
        for _ in range(10):
            os.writev(ends.a.fileno(), [b"head", b"er\n"])
            assert os.sendfile(ends.a.fileno(), file, 0, 5000) == 5000
            assert receive(ends.b, 7) == b"header\n"
            receive_pattern(ends.b, 5000)
    assert_on_ring(ends.a)


def sendfile_from_a_socket_is_refused() -> None:
    ends, other = pair(), pair()
    ends.a.sendall(b"x")
    readable(ends.b)
    args = (other.a.fileno(), ends.b.fileno(), None, 10)
    assert fails("sendfile", *args) in (errno.EINVAL, errno.ESPIPE)
    assert ends.b.recv(10) == b"x"


def sendfile_after_shutdown() -> None:
    import signal

    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    ends = pair()
    ends.a.shutdown(socket.SHUT_WR)
    with _file(100) as file:
        assert fails("sendfile", ends.a.fileno(), file, None, 10) == errno.EPIPE
        assert os.lseek(file, 0, os.SEEK_CUR) == 0


def sendfile_with_bad_arguments() -> None:
    ends = pair()
    with _file(100) as file:
        fd = ends.a.fileno()
        assert fails("sendfile", fd, -1, None, 10) == errno.EBADF
        assert fails("sendfile", fd, file, ctypes.c_void_p(8), 10) == errno.EFAULT
        offset = ctypes.c_long(-1)
        assert fails("sendfile", fd, file, ctypes.byref(offset), 10) == errno.EINVAL
        assert ok("sendfile", fd, file, None, 0) == 0
    ping_pong(ends.a, ends.b, 2)


def sendfile_of_python() -> None:
    ends = pair()
    with tempfile.TemporaryFile() as file:
        file.write(pattern(300000))
        file.seek(0)
        task = Task(receive_pattern, ends.b, 300000)
        assert ends.a.sendfile(file) == 300000
        task.result()


def splice_from_a_connection() -> None:
    """Socket to pipe: the bytes go over, no more than asked for."""
    ends = pair()
    reading, writing = os.pipe()
    ends.a.sendall(b"abcdefgh")
    readable(ends.b)
    assert ok("splice", ends.b.fileno(), None, writing, None, 5, 0) == 5
    assert os.read(reading, 100) == b"abcde"
    assert ends.b.recv(100) == b"fgh"


def splice_into_a_connection() -> None:
    ends = pair()
    reading, writing = os.pipe()
    os.write(writing, b"through the pipe")
    assert ok("splice", reading, None, ends.a.fileno(), None, 100, 0) == 16
    assert receive(ends.b, 16) == b"through the pipe"
    ends.a.sendall(b" and on")
    assert receive(ends.b, 7) == b" and on"


def splice_through() -> None:
    """A proxy of splices: connection, pipe, connection; 1 MiB."""
    left, right = pair(), pair()
    reading, writing = os.pipe()
    size = 1 << 20

    def proxy() -> None:
        done = 0
        while done < size:
            got = ok("splice", left.b.fileno(), None, writing, None, 65536, 0)
            assert got
            done += got
            while got:
                got -= ok("splice", reading, None, right.a.fileno(), None, got, 0)

    tasks = [
        Task(left.a.sendall, pattern(size)),
        Task(proxy),
        Task(receive_pattern, right.b, size),
    ]
    for task in tasks:
        task.result()


def splice_without_blocking() -> None:
    ends = pair()
    reading, writing = os.pipe()
    ends.b.setblocking(False)
    args = (ends.b.fileno(), None, writing, None, 100, 2)
    assert fails("splice", *args) == errno.EAGAIN
    ends.a.sendall(b"x")
    readable(ends.b)
    assert ok("splice", *args) == 1
    assert os.read(reading, 10) == b"x"


def splice_at_the_end() -> None:
    ends = pair()
    reading, writing = os.pipe()
    ends.a.sendall(b"x")
    ends.a.close()
    args = (ends.b.fileno(), None, writing, None, 100, 0)
    assert ok("splice", *args) == 1
    assert ok("splice", *args) == 0
    assert os.read(reading, 10) == b"x"


def splice_with_an_offset_is_refused() -> None:
    ends = pair()
    reading, writing = os.pipe()
    offset = ctypes.c_long(0)
    args = (ends.b.fileno(), ctypes.byref(offset), writing, None, 10, 0)
    assert fails("splice", *args) == errno.EINVAL
    assert fails("tee", ends.b.fileno(), writing, 10, 0) == errno.EINVAL
    assert poll_one(reading, select.POLLIN, 0) == 0


def copy_file_range_is_refused() -> None:
    ends = pair()
    with _file(10) as file:
        args = (file, None, ends.a.fileno(), None, 10, 0)
        assert fails("copy_file_range", *args) == errno.EINVAL
    ping_pong(ends.a, ends.b, 2)


def _stream(fd: int, mode: bytes) -> int:
    libc.fdopen.restype = ctypes.c_void_p
    stream = libc.fdopen(fd, mode)
    assert stream
    return int(stream)


def _put(stream: int, data: bytes) -> None:
    libc.fwrite.restype = ctypes.c_size_t
    pointer = ctypes.c_void_p(stream)
    size = ctypes.c_size_t
    assert libc.fwrite(data, size(1), size(len(data)), pointer) == len(data)
    assert libc.fflush(pointer) == 0


def _get(stream: int, length: int) -> bytes:
    libc.fread.restype = ctypes.c_size_t
    buffer = ctypes.create_string_buffer(length)
    size = ctypes.c_size_t
    got = libc.fread(buffer, size(1), size(length), ctypes.c_void_p(stream))
    return buffer.raw[:got]


def stdio_before_the_upgrade() -> None:
    """A stream over a fresh connection: reads, writes, and the other end's calls."""
    ends = pair(upgraded=False)
    out = _stream(os.dup(ends.b.fileno()), b"w")
    into = _stream(os.dup(ends.b.fileno()), b"r")
    for turn in range(100):
        line = b"line %3d\n" % turn
        ends.a.sendall(line)
        assert _get(into, 9) == line
        _put(out, line)
        assert receive(ends.a, 9) == line
    ends.b.close()
    assert libc.fclose(ctypes.c_void_p(out)) == 0
    assert poll_one(ends.a, select.POLLIN, 0) == 0
    assert libc.fclose(ctypes.c_void_p(into)) == 0
    assert ends.a.recv(1) == b""


def stdio_read_and_write_stream() -> None:
    ends = pair(upgraded=False)
    stream = _stream(ends.b.detach(), b"r+")
    _put(stream, b"hello\n")
    assert receive(ends.a, 6) == b"hello\n"
    ends.a.sendall(b"HELLO\n")
    libc.fseek(ctypes.c_void_p(stream), ctypes.c_long(0), 1)
    assert _get(stream, 6) == b"HELLO\n"
    libc.fclose(ctypes.c_void_p(stream))
    assert ends.a.recv(1) == b""


def stdio_after_the_upgrade() -> None:
    """Fdopen of a connection on its rings: nothing is lost on the way back."""
    ends = pair()
    ends.a.sendall(b"before\n")
    readable(ends.b)
    into = _stream(os.dup(ends.b.fileno()), b"r")
    out = _stream(os.dup(ends.b.fileno()), b"w")
    assert _get(into, 7) == b"before\n"
    for turn in range(50):
        line = b"line %3d\n" % turn
        ends.a.sendall(line)
        assert _get(into, 9) == line
        _put(out, line)
        assert receive(ends.a, 9) == line


def python_makefile() -> None:
    """Python's own streams use read and write; they stay on the ring."""
    ends = pair()
    with ends.b.makefile("rwb") as stream:
        for turn in range(50):
            ends.a.sendall(b"line %d\n" % turn)
            assert stream.readline() == b"line %d\n" % turn
            stream.write(b"answer %d\n" % turn)
            stream.flush()
            assert ends.a.recv(100) == b"answer %d\n" % turn
    assert_on_ring(ends.b)


def vmsplice_then_splice() -> None:
    from tests.conformance.kit import buffers, iovec

    ends = pair()
    reading, writing = os.pipe()
    (buffer,) = buffers(5)
    buffer.raw = b"pages"
    assert ok("vmsplice", writing, iovec([buffer]), 1, 0) == 5
    assert ok("splice", reading, None, ends.a.fileno(), None, 5, 0) == 5
    assert receive(ends.b, 5) == b"pages"
    vector = iovec([buffer])
    assert c("vmsplice", ends.a.fileno(), vector, 1, 0) == (-1, errno.EBADF)


def splice_into_a_full_connection() -> None:
    ends = pair()
    sent = send_until_full(ends.a)
    reading, writing = os.pipe()
    os.write(writing, pattern(1000, sent))
    args = (reading, None, ends.a.fileno(), None, 1000, 2)
    assert fails("splice", *args) == errno.EAGAIN
    receive_pattern(ends.b, sent)
    assert poll_one(ends.a, select.POLLOUT) == select.POLLOUT
    assert ok("splice", *args) == 1000
    receive_pattern(ends.b, 1000, sent)
