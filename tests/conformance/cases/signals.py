# SPDX-License-Identifier: Apache-2.0
"""Signals that arrive while a thread is asleep in a call, and SIGPIPE."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

from tests.conformance.kit import (
    Elapsed,
    Epoll,
    EpollEvent,
    MMsgHdr,
    PollFd,
    Task,
    buffers,
    c,
    each,
    expect,
    forked,
    handler,
    iovec,
    message,
    pair,
    pattern,
    ping_pong,
    receive,
    receive_pattern,
    send_until_full,
    timespec,
    until,
    until_asleep,
)

SIG = signal.SIGUSR1
_MAIN = threading.main_thread().ident
_PID = os.getpid()


def _when_asleep(action: Callable[[], Any]) -> Task[None]:
    """Does something once the main thread sleeps in its call."""
    main, pid = threading.main_thread(), os.getpid()

    def act() -> None:
        until_asleep(pid, main.native_id)
        action()

    return Task(act)


def _interrupt() -> None:
    assert _MAIN is not None
    signal.pthread_kill(_MAIN, SIG)


def _calls_that_read(sock: socket.socket) -> dict[str, tuple[Any, ...]]:
    (buffer,) = buffers(100)
    vector = iovec([buffer])
    header = message(vector)
    return {
        "read": (buffer, 100),
        "readv": (vector, 1),
        "recv": (buffer, 100, 0),
        "recvfrom": (buffer, 100, 0, None, None),
        "recvmsg": (ctypes.byref(header), 0),
        "recvmmsg": ((MMsgHdr * 1)(MMsgHdr(header)), 1, 0, None),
    }


_READS = ("read", "readv", "recv", "recvfrom", "recvmsg", "recvmmsg")


@each(*_READS)
def interrupted_reads(name: str) -> None:
    """Without SA_RESTART: EINTR, and the next read is as if nothing had been."""
    ends = pair()
    args = _calls_that_read(ends.b)[name]
    with handler(SIG, restart=False) as seen:
        task = _when_asleep(_interrupt)
        assert c(name, ends.b.fileno(), *args) == (-1, errno.EINTR)
        task.result()
        until(lambda: seen, "the handler ran")
    ends.a.sendall(b"after")
    assert ends.b.recv(100) == b"after"


@each(*_READS)
def restarted_reads(name: str) -> None:
    """With SA_RESTART the call goes on and gets the data."""
    ends = pair()
    args = _calls_that_read(ends.b)[name]

    def interrupt_then_send() -> None:
        _interrupt()
        # The flag of the signal is gone once it was delivered.
        until(lambda: not _pending(), "the signal is delivered")
        until_asleep(os.getpid(), threading.main_thread().native_id)
        ends.a.sendall(b"data")

    with handler(SIG, restart=True):
        task = _when_asleep(interrupt_then_send)
        result, error = c(name, ends.b.fileno(), *args)
        assert (result, error) == (1 if name == "recvmmsg" else 4, 0)
        task.result()


def _pending() -> bool:
    with open(f"/proc/self/task/{threading.main_thread().native_id}/status") as file:
        for line in file:
            if line.startswith("SigPnd:"):
                return bool(int(line.split()[1], 16) & (1 << (SIG - 1)))
    return False


@each("write", "send")
def interrupted_writes(name: str) -> None:
    """EINTR when nothing was taken, a short count when something was."""
    ends = pair()
    sent = send_until_full(ends.a)
    ends.a.setblocking(True)
    extra = () if name == "write" else (0,)
    with handler(SIG, restart=False):
        task = _when_asleep(_interrupt)
        result = c(name, ends.a.fileno(), b"x" * 1000, 1000, *extra)
        assert result == (-1, errno.EINTR)
        task.result()
    receive_pattern(ends.b, sent)


def interrupted_write_of_a_part() -> None:
    ends = pair()
    data = pattern(64 << 20)
    with handler(SIG, restart=False):
        task = _when_asleep(_interrupt)
        result, _ = c("send", ends.a.fileno(), data, len(data), 0)
        task.result()
    assert 0 < result < len(data)
    receive_pattern(ends.b, result)


def restarted_write() -> None:
    ends = pair()
    sent = send_until_full(ends.a)
    ends.a.setblocking(True)

    def interrupt_then_drain() -> None:
        _interrupt()
        until(lambda: not _pending(), "the signal is delivered")
        until_asleep(os.getpid(), threading.main_thread().native_id)
        receive_pattern(ends.b, sent)

    with handler(SIG, restart=True):
        task = _when_asleep(interrupt_then_drain)
        assert c("send", ends.a.fileno(), b"tail", 4, 0) == (4, 0)
        task.result()
    assert receive(ends.b, 4) == b"tail"


_WAITS = ("poll", "ppoll", "select", "pselect", "epoll_wait", "epoll_pwait",
          "epoll_pwait2")  # fmt: skip


def _wait_arguments(name: str, sock: socket.socket) -> tuple[Any, ...]:
    fd = sock.fileno()
    if name in ("poll", "ppoll"):
        entries = (PollFd * 1)(PollFd(fd, select.POLLIN, 0))
        return (entries, 1, -1) if name == "poll" else (entries, 1, None, None)
    if name in ("select", "pselect"):
        bits = (ctypes.c_uint64 * 16)()
        bits[fd // 64] |= 1 << (fd % 64)
        tail = (None,) if name == "select" else (None, None)
        return (fd + 1, bits, None, None, *tail)
    epoll = Epoll()
    epoll.add(sock, select.EPOLLIN, 1)
    events = (EpollEvent * 4)()
    if name == "epoll_wait":
        return (epoll.fd, events, 4, -1)
    if name == "epoll_pwait":
        return (epoll.fd, events, 4, -1, None)
    return (epoll.fd, events, 4, None, None)


def _needs(name: str) -> None:
    from tests.conformance.kit import Skip, libc

    if not hasattr(libc, name):
        raise Skip(f"this libc has no {name}")


@each(*_WAITS)
def interrupted_waits(name: str) -> None:
    """Waits always end with EINTR, SA_RESTART or not."""
    _needs(name)
    ends = pair()
    for restart in (False, True):
        args = _wait_arguments(name, ends.b)
        with handler(SIG, restart=restart):
            task = _when_asleep(_interrupt)
            assert c(name, *args) == (-1, errno.EINTR)
            task.result()
    ping_pong(ends.a, ends.b, 2)


@each("ppoll", "pselect", "epoll_pwait", "epoll_pwait2")
def signal_mask_of_a_wait(name: str) -> None:
    """A blocked signal that is pending is let in by the mask, and ends the wait."""
    _needs(name)
    ends = pair()
    args = list(_wait_arguments(name, ends.b))
    empty = ctypes.create_string_buffer(128)
    args[-1] = empty
    with handler(SIG, restart=False) as seen:
        signal.pthread_sigmask(signal.SIG_BLOCK, [SIG])
        _interrupt()
        assert c(name, *args) == (-1, errno.EINTR)
        signal.pthread_sigmask(signal.SIG_BLOCK, [])  # lets Python run the handler
        until(lambda: seen, "the handler ran")
        assert SIG in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [SIG])


@each("ppoll", "pselect", "epoll_pwait", "epoll_pwait2")
def signal_mask_keeps_a_signal_out(name: str) -> None:
    """With the signal in the mask, data ends the wait and the signal comes after."""
    _needs(name)
    ends = pair()
    args = list(_wait_arguments(name, ends.b))
    full = ctypes.create_string_buffer(b"\xff" * 128, 128)
    args[-1] = full

    def signal_then_send() -> None:
        _interrupt()
        until_asleep(os.getpid(), threading.main_thread().native_id)
        ends.a.sendall(b"x")

    with handler(SIG, restart=False) as seen:
        task = _when_asleep(signal_then_send)
        assert c(name, *args) == (1, 0)
        task.result()
        until(lambda: seen, "the handler ran")


def sigpipe_by_default_ends_the_process() -> None:
    ends = pair()
    ends.a.shutdown(socket.SHUT_WR)

    def write() -> None:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.write(ends.a.fileno(), b"x")

    _, status = os.waitpid(forked(write), 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGPIPE


@each("write", "send", "writev", "sendmsg")
def sigpipe_goes_to_the_handler(name: str) -> None:
    ends = pair()
    ends.a.shutdown(socket.SHUT_WR)
    (buffer,) = buffers(4)
    vector = iovec([buffer])
    header = message(vector)
    args: tuple[Any, ...] = {
        "write": (buffer, 4),
        "send": (buffer, 4, 0),
        "writev": (vector, 1),
        "sendmsg": (ctypes.byref(header), 0),
    }[name]
    with handler(signal.SIGPIPE, restart=False) as seen:
        assert c(name, ends.a.fileno(), *args) == (-1, errno.EPIPE)
        assert seen == [signal.SIGPIPE]


def sigpipe_ignored() -> None:
    ends = pair()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    ends.a.shutdown(socket.SHUT_WR)
    expect(errno.EPIPE, ends.a.send, b"x")
    expect(errno.EPIPE, os.write, ends.a.fileno(), b"x")


def no_sigpipe_for_the_first_write_after_the_peer_closed() -> None:
    ends = pair()
    with handler(signal.SIGPIPE, restart=False) as seen:
        ends.b.close()
        assert ends.a.recv(1) == b""
        assert ends.a.send(b"x") == 1
        poller = select.poll()
        poller.register(ends.a, 0)
        assert poller.poll(8000)
        expect(errno.EPIPE, ends.a.send, b"x")
        until(lambda: seen, "SIGPIPE came")


def calls_inside_a_signal_handler() -> None:
    """A handler may use the connection that its thread is waiting on."""
    ends = pair()
    got: list[bytes] = []

    def on_signal(_number: int, _frame: object) -> None:
        ends.b.sendall(b"from the handler")
        got.append(ends.a.recv(100))

    before = signal.signal(SIG, on_signal)

    def signal_then_send() -> None:
        _interrupt()
        until(lambda: got, "the handler ran")
        until_asleep(os.getpid(), threading.main_thread().native_id)
        ends.a.sendall(b"data")

    task = _when_asleep(signal_then_send)
    assert ends.b.recv(100) == b"data"
    task.result()
    signal.signal(SIG, before)
    assert got == [b"from the handler"]


def interrupted_receive_timeout_is_not_restarted() -> None:
    """A read with SO_RCVTIMEO ends with EINTR, also with SA_RESTART."""
    ends = pair()
    ends.b.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 7, 0))
    (buffer,) = buffers(4)
    with handler(SIG, restart=True):
        task = _when_asleep(_interrupt)
        assert c("recv", ends.b.fileno(), buffer, 4, 0) == (-1, errno.EINTR)
        task.result()


def a_timer_keeps_ticking() -> None:
    """A timer ends each wait; none of the bytes is lost."""
    ends = pair()
    with handler(signal.SIGALRM, restart=True) as seen:
        signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
        task = Task(ends.a.sendall, pattern(8 << 20))
        receive_pattern(ends.b, 8 << 20)
        task.result()
        until(lambda: len(seen) > 3, "the timer ticked")
        signal.setitimer(signal.ITIMER_REAL, 0)


def timed_wait_with_a_deadline() -> None:
    """Ppoll and pselect do not come back early."""
    ends = pair()
    for name in ("ppoll", "pselect"):
        args = list(_wait_arguments(name, ends.b))
        args[-2] = timespec(0.03)
        elapsed = Elapsed()
        assert c(name, *args) == (0, 0)
        assert elapsed() >= 0.029
