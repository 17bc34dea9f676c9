# SPDX-License-Identifier: Apache-2.0
"""Every call that moves bytes: all of them arrive, once and in order."""

from __future__ import annotations

import array
import ctypes
import errno
import os
import random
import socket
from collections.abc import Callable

from tests.conformance.kit import (
    MMsgHdr,
    MsgHdr,
    Pair,
    Task,
    buffers,
    c,
    each,
    expect,
    fails,
    far_pair,
    iovec,
    message,
    ok,
    pair,
    pattern,
    readable,
    receive,
    receive_pattern,
)

Writer = Callable[[int, bytes], int]
Reader = Callable[[int, int], bytes]


def _parts(data: bytes) -> list[bytes]:
    third = len(data) // 3
    return [data[:third], b"", data[third : 2 * third], data[2 * third :]]


def _write_write(fd: int, data: bytes) -> int:
    return os.write(fd, data)


def _write_writev(fd: int, data: bytes) -> int:
    return os.writev(fd, _parts(data))


def _write_pwritev2(fd: int, data: bytes) -> int:
    parts = [ctypes.create_string_buffer(p, max(len(p), 1)) for p in _parts(data)]
    vector = iovec(parts, [len(p) for p in _parts(data)])
    return ok("pwritev2", fd, vector, len(vector), -1, 0)


def _write_send(fd: int, data: bytes) -> int:
    return ok("send", fd, data, len(data), 0)


def _write_sendto(fd: int, data: bytes) -> int:
    return ok("sendto", fd, data, len(data), 0, None, 0)


def _write_sendmsg(fd: int, data: bytes) -> int:
    with socket.socket(fileno=os.dup(fd)) as sock:
        count: int = sock.sendmsg(_parts(data))
        return count


def _write_sendmmsg(fd: int, data: bytes) -> int:
    parts = [ctypes.create_string_buffer(p, max(len(p), 1)) for p in _parts(data)]
    lengths = [len(p) for p in _parts(data)]
    first, second = iovec(parts[:2], lengths[:2]), iovec(parts[2:], lengths[2:])
    messages = (MMsgHdr * 2)(MMsgHdr(message(first)), MMsgHdr(message(second)))
    assert ok("sendmmsg", fd, messages, 2, 0) == 2
    total: int = messages[0].len + messages[1].len
    return total


def _read_read(fd: int, most: int) -> bytes:
    return os.read(fd, most)


def _read_readv(fd: int, most: int) -> bytes:
    parts = [bytearray(most // 2), bytearray(0), bytearray(most - most // 2)]
    count = os.readv(fd, parts)
    return b"".join(parts)[:count]


def _read_preadv2(fd: int, most: int) -> bytes:
    parts = buffers(most // 2, most - most // 2)
    count = ok("preadv2", fd, iovec(parts, [most // 2, most - most // 2]), 2, -1, 0)
    return (parts[0].raw[: most // 2] + parts[1].raw)[:count]


def _read_recv(fd: int, most: int) -> bytes:
    (buffer,) = buffers(most)
    count = ok("recv", fd, buffer, most, 0)
    return buffer.raw[:count]


def _read_recvfrom(fd: int, most: int) -> bytes:
    (buffer,) = buffers(most)
    address = (ctypes.c_char * 128)()
    length = ctypes.c_uint32(128)
    count = ok("recvfrom", fd, buffer, most, 0, address, ctypes.byref(length))
    assert length.value == 0  # TCP gives no address, and says so
    return buffer.raw[:count]


def _read_recvfrom_without_address(fd: int, most: int) -> bytes:
    (buffer,) = buffers(most)
    count = ok("recvfrom", fd, buffer, most, 0, None, None)
    return buffer.raw[:count]


def _read_recvmsg(fd: int, most: int) -> bytes:
    parts = buffers(most // 2, most - most // 2)
    vector = iovec(parts, [most // 2, most - most // 2])
    control = ctypes.create_string_buffer(64)
    header = MsgHdr(iov=vector, iovlen=2, control=ctypes.addressof(control))
    header.controllen, header.flags = 64, -1
    count = ok("recvmsg", fd, ctypes.byref(header), 0)
    assert header.flags == 0
    assert header.controllen == 0
    return (parts[0].raw[: most // 2] + parts[1].raw)[:count]


def _read_recvmmsg(fd: int, most: int) -> bytes:
    (buffer,) = buffers(most)
    messages = (MMsgHdr * 1)(MMsgHdr(message(iovec([buffer], [most]))))
    assert ok("recvmmsg", fd, messages, 1, 0, None) == 1
    return buffer.raw[: messages[0].len]


_WRITERS = (
    _write_write,
    _write_writev,
    _write_pwritev2,
    _write_send,
    _write_sendto,
    _write_sendmsg,
    _write_sendmmsg,
)
_READERS = (
    _read_read,
    _read_readv,
    _read_preadv2,
    _read_recv,
    _read_recvfrom,
    _read_recvfrom_without_address,
    _read_recvmsg,
    _read_recvmmsg,
)
_SIZES = (1, 2, 3, 7, 64, 1000, 4096, 5000, 16384)


@each(*_WRITERS)
def writes(write: Writer) -> None:
    """Both directions, sizes in turn, boundaries kept as the writer made them."""
    ends = pair()
    for sender, receiver in (ends, (ends.b, ends.a)):
        at = 0
        for size in _SIZES:
            assert write(sender.fileno(), pattern(size, at)) == size
            receive_pattern(receiver, size, at)
            at += size


@each(*_READERS)
def reads(read: Reader) -> None:
    ends = pair()
    for sender, receiver in (ends, (ends.b, ends.a)):
        at = 0
        for size in _SIZES:
            sender.sendall(pattern(size, at))
            got = b""
            while len(got) < size:
                got += read(receiver.fileno(), size - len(got))
            assert got == pattern(size, at)
            at += size


@each(*_READERS)
def short_reads(read: Reader) -> None:
    """A read takes no more than it asked for, and the rest stays."""
    ends = pair()
    ends.a.sendall(pattern(1000))
    got = b""
    for most in (1, 2, 99, 498, 399, 1):
        got += read(ends.b.fileno(), most)
    assert got == pattern(1000)
    ends.a.sendall(b"tail")
    assert read(ends.b.fileno(), 4096) == b"tail"


@each(*_READERS)
def reads_at_the_end(read: Reader) -> None:
    """What was sent before the end is read first; the end is then seen again."""
    ends = pair()
    ends.a.sendall(b"last")
    ends.a.close()
    assert read(ends.b.fileno(), 100) == b"last"
    for _ in range(3):
        assert read(ends.b.fileno(), 100) == b""


@each(*_READERS)
def blocked_reads(read: Reader) -> None:
    """A thread asleep in the call wakes for the first byte."""
    ends = pair()
    for turn in range(3):
        task = Task(read, ends.b.fileno(), 100).until_asleep()
        ends.a.sendall(b"wake %d" % turn)
        assert task.result() == b"wake %d" % turn


@each(*_READERS)
def blocked_reads_across_processes(read: Reader) -> None:
    sock, peer = far_pair()
    for turn in range(3):
        task = Task(read, sock.fileno(), 100).until_asleep()
        peer.call("send", b"wake %d" % turn)
        assert task.result() == b"wake %d" % turn
    peer.finish()


@each(*_READERS)
def empty_non_blocking(read: Reader) -> None:
    ends = pair()
    ends.b.setblocking(False)

    expect(errno.EAGAIN, read, ends.b.fileno(), 10)
    ends.a.sendall(b"x")
    readable(ends.b)
    assert read(ends.b.fileno(), 10) == b"x"
    expect(errno.EAGAIN, read, ends.b.fileno(), 10)


@each(*_WRITERS)
def full_non_blocking(write: Writer) -> None:
    """Writes until there is no room, then EAGAIN; every byte that was taken arrives."""
    ends = pair()
    ends.a.setblocking(False)
    total = 0
    try:
        while True:
            total += write(ends.a.fileno(), pattern(30000, total))
    except BlockingIOError:
        pass
    assert total > 30000
    drained = Task(receive_pattern, ends.b, total + 1000)
    left = 1000
    ends.a.setblocking(True)
    ends.a.sendall(pattern(left, total))
    drained.result()


@each(*_WRITERS)
def blocked_writes(write: Writer) -> None:
    """A blocking write of more than fits returns when all of it was taken."""
    ends = pair()
    size = 8 << 20
    task = Task(write, ends.a.fileno(), pattern(size)).until_asleep()
    receive_pattern(ends.b, size)
    assert task.result() == size


@each(False, True)
def big_transfer_both_ways(across: bool) -> None:
    """16 MiB each way at once."""
    size = 16 << 20
    if across:
        sock, peer = far_pair()
        peer.start("send_pattern", size)
        receive_pattern(sock, size)
        peer.result()
        peer.start("receive_pattern", size)
        sock.sendall(pattern(size))
        peer.result()
        peer.finish()
        return
    ends = pair()
    tasks = [
        Task(ends.a.sendall, pattern(size)),
        Task(receive_pattern, ends.b, size),
        Task(ends.b.sendall, pattern(size)),
        Task(receive_pattern, ends.a, size),
    ]
    for task in tasks:
        task.result()


def many_small_messages() -> None:
    ends = pair()
    count, size = 20000, 37
    task = Task(receive_pattern, ends.b, count * size)
    for index in range(count):
        ends.a.sendall(pattern(size, index * size))
    task.result()


def random_sizes() -> None:
    """Random calls and sizes on both sides, 2 MiB in all."""
    rng = random.Random(7)
    ends = pair()
    total = 2 << 20

    def read_all() -> None:
        at = 0
        mine = random.Random(8)
        while at < total:
            data = mine.choice(_READERS)(
                ends.b.fileno(), mine.choice((2, 100, 4096, 70000))
            )
            assert data == pattern(len(data), at), f"wrong bytes near {at}"
            at += len(data)

    task = Task(read_all)
    at = 0
    while at < total:
        size = min(rng.choice((3, 64, 1500, 9000, 200000)), total - at)
        at += rng.choice(_WRITERS)(ends.a.fileno(), pattern(size, at))
    task.result()


def one_socket_four_writers() -> None:
    """Small sends of several threads arrive whole."""
    ends = pair()
    words = [bytes([65 + index]) * 64 for index in range(4)]

    def write_words(word: bytes) -> None:
        for _ in range(500):
            assert ends.a.send(word) == 64

    tasks = [Task(write_words, word) for word in words]
    counts = dict.fromkeys(words, 0)
    for _ in range(2000):
        counts[receive(ends.b, 64)] += 1
    for task in tasks:
        task.result()
    assert set(counts.values()) == {500}


def one_socket_four_readers() -> None:
    """Each byte goes to one reader."""
    ends = pair()

    def read_some() -> bytes:
        got = b""
        while part := ends.b.recv(50):
            got += part
        return got

    tasks = [Task(read_some) for _ in range(4)]
    data = array.array("I", range(20000)).tobytes()
    ends.a.sendall(data)
    ends.a.shutdown(socket.SHUT_WR)
    got = b"".join(task.result() for task in tasks)
    assert sorted(got) == sorted(data)


def recvmmsg_gives_what_is_there() -> None:
    """With MSG_DONTWAIT it stops when the stream is empty."""
    ends = pair()
    ends.a.sendall(b"abcdef")
    readable(ends.b)
    parts = buffers(4, 4, 4)
    vectors = [iovec([part]) for part in parts]
    messages = (MMsgHdr * 3)(*(MMsgHdr(message(v)) for v in vectors))
    assert ok("recvmmsg", ends.b.fileno(), messages, 3, socket.MSG_DONTWAIT, None) == 2
    assert (messages[0].len, messages[1].len) == (4, 2)
    assert parts[0].raw + parts[1].raw[:2] == b"abcdef"
    assert (
        fails("recvmmsg", ends.b.fileno(), messages, 3, socket.MSG_DONTWAIT, None)
        == errno.EAGAIN
    )


def recvmmsg_wait_for_one() -> None:
    ends = pair()
    parts = buffers(4, 4)
    vectors = [iovec([part]) for part in parts]
    messages = (MMsgHdr * 2)(*(MMsgHdr(message(v)) for v in vectors))
    wait_for_one = 0x10000
    task = Task(
        ok, "recvmmsg", ends.b.fileno(), messages, 2, wait_for_one, None
    ).until_asleep()
    ends.a.sendall(b"one")
    assert task.result() == 1
    assert parts[0].raw[:3] == b"one"


def readv_fills_in_order() -> None:
    ends = pair()
    ends.a.sendall(b"abcdefghij")
    readable(ends.b)
    parts = [bytearray(1), bytearray(0), bytearray(3), bytearray(100)]
    assert os.readv(ends.b.fileno(), parts) == 10
    assert bytes(parts[0] + parts[2] + parts[3][:6]) == b"abcdefghij"


def data_waits_for_a_late_reader() -> None:
    ends = pair()
    for turn in range(50):
        ends.a.sendall(pattern(1000, turn * 1000))
    receive_pattern(ends.b, 50000)


def positioned_reads_are_refused() -> None:
    """A socket has no position: pread, pwrite, lseek."""
    ends = pair()
    ends.a.sendall(b"x")
    expect(errno.ESPIPE, os.pread, ends.b.fileno(), 1, 0)
    expect(errno.ESPIPE, os.pwrite, ends.b.fileno(), b"x", 0)
    expect(errno.ESPIPE, os.lseek, ends.b.fileno(), 0, os.SEEK_CUR)
    assert ends.b.recv(10) == b"x"


def preadv2_without_waiting() -> None:
    """RWF_NOWAIT on a blocking socket."""
    ends = pair()
    (buffer,) = buffers(10)
    nowait = 8
    result = c("preadv2", ends.b.fileno(), iovec([buffer]), 1, -1, nowait)
    assert result == (-1, errno.EAGAIN)
    ends.a.sendall(b"now")
    readable(ends.b)
    assert ok("preadv2", ends.b.fileno(), iovec([buffer]), 1, -1, nowait) == 3
    assert buffer.raw[:3] == b"now"


def wrong_direction_of_time() -> None:
    """Both ends write before either reads."""
    ends = pair()
    for turn in range(100):
        ends.a.sendall(pattern(500, turn))
        ends.b.sendall(pattern(500, turn + 1))
        assert receive(ends.a, 500) == pattern(500, turn + 1)
        assert receive(ends.b, 500) == pattern(500, turn)


@each("a", "b")
def one_way_stream(sender_name: str) -> None:
    """A stream that only ever goes one way, from either end."""
    ends: Pair = pair()
    sender, receiver = (ends.a, ends.b) if sender_name == "a" else (ends.b, ends.a)
    task = Task(receive_pattern, receiver, 4 << 20)
    sender.sendall(pattern(4 << 20))
    task.result()


def more_parts_than_one_page_of_iovecs() -> None:
    """IOV_MAX parts of a few bytes each."""
    ends = pair()
    data = [pattern(5, index * 5) for index in range(1024)]
    assert os.writev(ends.a.fileno(), data) == 5120
    into = [bytearray(3) for _ in range(1024)]
    readable(ends.b)
    count = os.readv(ends.b.fileno(), into)
    got = b"".join(into)[:count]
    got += receive(ends.b, 5120 - count)
    assert got == pattern(5120)


def null_vector_of_no_parts() -> None:
    ends = pair()
    assert ok("writev", ends.a.fileno(), None, 0) == 0
    assert ok("readv", ends.b.fileno(), None, 0) == 0
