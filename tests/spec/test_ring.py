# SPDX-License-Identifier: Apache-2.0
"""kmap.ring: what its docstring guarantees, with two processes and within one."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

from kmap.ring import Channel, PeerDied, ProtocolViolation, WouldBlock

Pair = tuple[Channel, Channel]


def fill(channel: Channel, timeout: float | None) -> None:
    """Writes until an exception ends it."""
    while True:
        channel.write(bytes(50_000), timeout)


def read_again_and_again(channel: Channel) -> None:
    """Reads until an exception other than WouldBlock ends it."""
    while True:
        with contextlib.suppress(WouldBlock):
            channel.read(1, 0)


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Both ends within this process."""
    left, right = socket.socketpair()
    with left, right, Channel.create(left, ring_size=65536) as one:
        with Channel.attach(right) as other:
            yield one, other


def in_child(work: Callable[[Channel], None]) -> tuple[Channel, socket.socket, int]:
    """Creates a channel whose other end a child process has; and its pid."""
    left, right = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            left.close()
            work(Channel.attach(right))
            status = 0
        finally:
            os._exit(status)
    right.close()
    return Channel.create(left, ring_size=65536), left, pid


def test_bytes_arrive_in_order_between_two_processes() -> None:
    data = bytes(range(256)) * 5000

    def echo(channel: Channel) -> None:
        buffer = bytearray(10_007)
        while count := channel.readinto(buffer):
            with memoryview(buffer) as view:
                channel.write_all(view[:count])
        channel.shutdown()

    channel, sock, pid = in_child(echo)
    with sock, channel:
        received = bytearray()

        def collect() -> None:
            while part := channel.read(65536):
                received.extend(part)

        reader = threading.Thread(target=collect)
        reader.start()
        channel.write_all(data)
        channel.shutdown()
        reader.join()
        assert received == data
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_dead_peer_is_noticed_after_its_last_bytes() -> None:
    def die(channel: Channel) -> None:
        channel.write_all(b"last words")
        os.kill(os.getpid(), signal.SIGKILL)

    channel, sock, pid = in_child(die)
    with sock, channel:
        assert channel.read(100) == b"last words"
        with pytest.raises(PeerDied):
            channel.read(100)
        os.waitpid(pid, 0)


def test_a_writer_that_waits_for_space_notices_a_dead_peer() -> None:
    def die(channel: Channel) -> None:
        channel.read(1)
        os.kill(os.getpid(), signal.SIGKILL)

    channel, sock, pid = in_child(die)
    with sock, channel:
        with pytest.raises((PeerDied, BrokenPipeError)):
            fill(channel, None)
        os.waitpid(pid, 0)


def test_timeouts(pair: Pair) -> None:
    one, other = pair
    with pytest.raises(WouldBlock):
        one.read(1, 0)
    with pytest.raises(TimeoutError):
        one.read(1, 0.01)
    with pytest.raises(WouldBlock):
        fill(one, 0)
    with pytest.raises(TimeoutError):
        one.write(b"x", 0.01)
    assert one.unread == other.readable > 0
    with pytest.raises(ValueError, match="timeout"):
        one.read(1, -1)


def test_signal_handlers_run_while_a_call_waits(pair: Pair) -> None:
    one, other = pair
    ran = []

    def handler(number: int, frame: FrameType | None) -> None:
        ran.append(number)
        other.write_all(b"now")

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        main = threading.main_thread().ident
        assert main is not None
        # Whether it comes before or during the wait, the read must return.
        threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGUSR1)).start()
        assert one.read(10) == b"now"
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert ran == [signal.SIGUSR1]


def test_end_of_stream_one_way(pair: Pair) -> None:
    one, other = pair
    one.write_all(b"abc")
    one.shutdown()
    assert other.read(10) == b"abc"
    assert other.read(10) == b""
    assert other.read(10) == b""
    other.write_all(b"still")
    assert one.read(10) == b"still"
    with pytest.raises(BrokenPipeError):
        one.write(b"x")


def test_buffers_are_used_in_place(pair: Pair) -> None:
    one, other = pair
    target = bytearray(b"........")
    assert one.write(memoryview(b"abcdef")[2:4]) == 2
    with memoryview(target) as view:
        assert other.readinto(view[3:]) == 2
    assert target == b"...cd..."
    with pytest.raises(BufferError):
        other.readinto(b"read-only")
    with pytest.raises(BufferError):
        one.write(memoryview(b"abcdef")[::2])
    with pytest.raises(TypeError):
        one.write("text")
    with pytest.raises(ValueError, match="empty"):
        other.readinto(bytearray())
    # Every export was released: a bytearray with one cannot be resized.
    target.append(0)


def test_one_reader_at_a_time(pair: Pair) -> None:
    one, other = pair
    inside = threading.Event()
    got: list[bytes] = []

    def read() -> None:
        inside.set()
        got.append(one.read(1))

    reader = threading.Thread(target=read)
    reader.start()
    inside.wait()
    # The thread announces itself just before it is inside; until then this read
    # would find nothing and say so.
    with pytest.raises(RuntimeError, match="another thread is reading"):
        read_again_and_again(one)
    other.write(b"x")
    reader.join()
    assert got == [b"x"]


def test_closing_while_a_thread_reads(pair: Pair) -> None:
    one, other = pair
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(one.read(1)))
    reader.start()
    one.close()
    assert other.read(1) == b"", "the peer sees the end at once"
    other.close()
    reader.join()
    with pytest.raises(ValueError, match="closed"):
        one.read(1)


def test_a_message_that_is_not_a_channel_is_refused() -> None:
    left, right = socket.socketpair()
    with left, right:
        socket.send_fds(left, [b"something else"], [0])
        with pytest.raises(ProtocolViolation):
            Channel.attach(right)
        left.close()
        with pytest.raises(ConnectionError, match="closed before"):
            Channel.attach(right)


def test_unsealed_memory_is_refused() -> None:
    left, right = socket.socketpair()
    with left, right, Channel.create(left) as channel:
        memory = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
        size = os.fstat(channel.fds[0]).st_size
        os.ftruncate(memory, size)
        fds = [memory, *map(os.dup, channel.fds[1:])]
        try:
            with pytest.raises(PermissionError):
                Channel.attach_fds(fds)
        finally:
            # Still ours after a refusal.
            for fd in fds:
                os.close(fd)


def test_nothing_is_left_open() -> None:
    def descriptors() -> set[str]:
        return set(os.listdir("/proc/self/fd"))

    gc.collect()
    before = descriptors()
    left, right = socket.socketpair()
    with left, right:
        for _ in range(3):
            with Channel.create(left) as one, Channel.attach(right) as other:
                one.write(b"x")
                assert other.read(1) == b"x"
    assert descriptors() == before
