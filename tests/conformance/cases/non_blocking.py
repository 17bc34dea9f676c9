# SPDX-License-Identifier: Apache-2.0
"""O_NONBLOCK, which belongs to the open file description: whoever changes it."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from kmap.launch import without_kmap
from tests.conformance.kit import (
    Pair,
    Task,
    assert_on_ring,
    each,
    expect,
    forked,
    pair,
    pattern,
    reap,
    receive_pattern,
    send_until_full,
)

# On file 0, by a program without Kmap.
_CHANGE = """
import fcntl, os, sys
flags = fcntl.fcntl(0, fcntl.F_GETFL)
on = sys.argv[1] == "on"
fcntl.fcntl(0, fcntl.F_SETFL, flags | os.O_NONBLOCK if on else flags & ~os.O_NONBLOCK)
"""


def _strange_program(sock: socket.socket, on: bool) -> None:
    """A program in which the library is not changes the flag on its standard input."""
    command = [sys.executable, "-S", "-c", _CHANGE, "on" if on else "off"]
    env = without_kmap(os.environ)
    assert subprocess.run(command, stdin=sock.fileno(), env=env).returncode == 0


def _by_shell(sock: socket.socket, on: bool) -> None:
    """The same, started by system(): libc's own doing from beginning to end."""
    before = os.dup(0)
    os.dup2(sock.fileno(), 0)
    word = "on" if on else "off"
    command = f"env -u LD_PRELOAD '{sys.executable}' -S -c '{_CHANGE}' {word}"
    assert os.system(command) == 0
    os.dup2(before, 0)


def _by_fork_and_exec(sock: socket.socket, on: bool) -> None:
    pid = os.fork()
    if pid == 0:
        os.dup2(sock.fileno(), 0)
        command = [sys.executable, "-S", "-c", _CHANGE, "on" if on else "off"]
        os.execve(sys.executable, command, without_kmap(os.environ))
    reap(pid)


def _by_a_fork(sock: socket.socket, on: bool) -> None:
    reap(forked(lambda: sock.setblocking(not on)))


def _by_a_fork_with_fcntl(sock: socket.socket, on: bool) -> None:
    reap(forked(lambda: os.set_blocking(sock.fileno(), not on)))


Change = Callable[[socket.socket, bool], None]
_CHANGES: tuple[Change, ...] = (
    _strange_program,
    _by_shell,
    _by_fork_and_exec,
    _by_a_fork,
    _by_a_fork_with_fcntl,
)


def _blocking_pair() -> Pair:
    ends = pair()
    assert not fcntl.fcntl(ends.b, fcntl.F_GETFL) & os.O_NONBLOCK
    return ends


def _by_libc(sock: socket.socket, most: int) -> bytes:
    """os.read, which knows nothing of what Python thinks of the socket."""
    return os.read(sock.fileno(), most)


@each(*_CHANGES)
def set_by_another_process(change: Change) -> None:
    """A blocking read on a description that has become non-blocking: EAGAIN."""
    ends = _blocking_pair()
    change(ends.b, True)
    expect(errno.EAGAIN, _by_libc, ends.b, 10)
    ends.a.sendall(b"there")
    assert ends.b.recv(10) == b"there"
    expect(errno.EAGAIN, _by_libc, ends.b, 10)
    # What is given to a program goes back to the kernel.
    if change in (_by_a_fork, _by_a_fork_with_fcntl):
        assert_on_ring(ends.b)


@each(*_CHANGES)
def cleared_by_another_process(change: Change) -> None:
    """A read on a description that has become blocking waits."""
    ends = pair()
    os.set_blocking(ends.b.fileno(), False)
    expect(errno.EAGAIN, _by_libc, ends.b, 10)
    change(ends.b, False)
    task = Task(_by_libc, ends.b, 10).until_asleep()
    ends.a.sendall(b"later")
    assert task.result() == b"later"


@each(*_CHANGES)
def set_and_cleared_by_another_process(change: Change) -> None:
    """What ssh does to the terminal it was started on."""
    ends = _blocking_pair()
    for _ in range(2):
        change(ends.b, True)
        expect(errno.EAGAIN, _by_libc, ends.b, 10)
        change(ends.b, False)
        task = Task(_by_libc, ends.b, 10).until_asleep()
        ends.a.sendall(b"later")
        assert task.result() == b"later"


def writes_of_a_description_made_non_blocking() -> None:
    ends = _blocking_pair()
    sent = send_until_full(ends.a)
    os.set_blocking(ends.a.fileno(), True)
    _by_a_fork(ends.a, True)
    expect(errno.EAGAIN, os.write, ends.a.fileno(), b"x")
    _by_a_fork(ends.a, False)
    task = Task(os.write, ends.a.fileno(), pattern(100_000, sent)).until_asleep()
    receive_pattern(ends.b, sent + 100_000)
    assert task.result() == 100_000


def a_sleeper_sleeps_on() -> None:
    """The flag counts when the call is made, not while it sleeps."""
    ends = _blocking_pair()
    task = Task(_by_libc, ends.b, 10).until_asleep()
    ends.b.setblocking(False)
    task.until_asleep()
    ends.a.sendall(b"x")
    assert task.result() == b"x"
    expect(errno.EAGAIN, _by_libc, ends.b, 10)


def a_duplicate_shares_the_flag() -> None:
    ends = _blocking_pair()
    copy = os.dup(ends.b.fileno())
    os.set_blocking(copy, False)
    expect(errno.EAGAIN, _by_libc, ends.b, 10)
    os.set_blocking(ends.b.fileno(), True)
    task = Task(os.read, copy, 10).until_asleep()
    ends.a.sendall(b"x")
    assert task.result() == b"x"
    os.close(copy)


def opened_anew_by_proc_is_refused() -> None:
    """A socket cannot be opened by /proc, so nobody has a description of its own."""
    ends = pair()
    expect(errno.ENXIO, Path(f"/proc/self/fd/{ends.b.fileno()}").open)
