# SPDX-License-Identifier: Apache-2.0
"""endpoint.py SPECIFICATION: one end of an echo over TCP, with system calls refused.

SPECIFICATION is JSON: "port" (0: this end accepts, and prints its port), "shape"
(blocking, epoll or poll), "filters", a list of {"stage", "seen", "rules"}.  A rule is
[call, errno name or KILL, [[argument, "==" or ">=", value], ...]].

A filter is installed at its stage: "start", before there is any socket; "before", with
the connection made; or "during", in the middle of the traffic.  Unless it is to be
"seen", it is installed around the library, as if by an inline system call.

The connecting end prints "done" when all has come back unchanged.  Each end waits for a
line on its standard input, closes the connection, prints as JSON what it still has that
it did not have before, and waits for the end of its standard input.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import select
import socket
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import pyseccomp

ROUNDS = 60
HALF = 30
# Hidden descriptors have numbers from here on.
SOFT_LIMIT = 256
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2
OPERATORS = {"==": pyseccomp.EQ, ">=": pyseccomp.GE}


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def install(rules: list[Any], *, seen: bool) -> None:
    """Has the kernel answer the calls with errors from now on."""
    made = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    for call, name, conditions in rules:
        made.add_rule(
            pyseccomp.KILL_PROCESS
            if name == "KILL"
            else pyseccomp.ERRNO(getattr(errno, name)),
            call,
            *(pyseccomp.Arg(at, OPERATORS[op], value) for at, op, value in conditions),
        )
    with tempfile.TemporaryFile() as file:
        made.export_bpf(file)
        file.seek(0)
        code = file.read()
    # A handle of libc alone finds libc's own functions, one of the program what is
    # preloaded.
    libc = ctypes.CDLL(None if seen else "libc.so.6", use_errno=True)
    program = Program(len(code) // 8, code)
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_SECCOMP")


class Stream:
    """A connection in one of the shapes."""

    def __init__(self, sock: socket.socket, shape: str) -> None:
        self.sock = sock
        self.wait: Callable[[int], object] | None = None
        if shape == "blocking":
            return
        sock.setblocking(False)
        if shape == "epoll":
            self.epoll = select.epoll()
            self.epoll.register(sock, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
            self.wait = lambda _: self.epoll.poll()
        else:
            self.poll = select.poll()
            self.wait = self.wait_in_poll

    def wait_in_poll(self, events: int) -> None:
        self.poll.register(self.sock, events)
        self.poll.poll()

    def receive(self, most: int) -> bytes:
        while True:
            try:
                return self.sock.recv(most)
            except BlockingIOError:
                assert self.wait is not None
                self.wait(select.POLLIN)

    def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self.sock.send(view) :]
            except BlockingIOError:
                assert self.wait is not None
                self.wait(select.POLLOUT)

    def close(self) -> None:
        if hasattr(self, "epoll"):
            self.epoll.close()
        self.sock.close()


def open_now() -> dict[str, str]:
    """What this process has open, by number."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
    return found


def is_latch(fd: int) -> bool:
    """Whether it is what a bell is rung by, which stays with the process."""
    try:
        with socket.socket(fileno=os.dup(fd)) as sock:
            return (sock.family, sock.type) == (socket.AF_UNIX, socket.SOCK_DGRAM)
    except OSError:
        return False


def left_over(before: dict[str, str]) -> list[str]:
    """What a closed connection has left open or mapped."""
    kept = ("/memfd:kmap-stats", "/memfd:kmap-bell", "anon_inode:", "/dev/shm/#")
    found = [
        f"{name} -> {link}"
        for name, link in open_now().items()
        if name not in before and not link.startswith(kept) and not is_latch(int(name))
    ]
    with open("/proc/self/maps") as maps:
        found.extend(line.strip() for line in maps if "kmap-segment" in line)
    return found


def message(number: int) -> bytes:
    size = 1 + (number * 7919) % 30000
    return (bytes(range(number % 200, 256)) * (size // 50 + 1))[:size]


def main() -> None:
    """Makes the connection, and lets the traffic pass."""
    spec = json.loads(sys.argv[1])
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT_LIMIT, hard))

    def stage(name: str) -> None:
        for each in spec["filters"]:
            if each["stage"] == name:
                install(each["rules"], seen=each["seen"])

    stage("start")
    before = open_now()
    accepts = spec["port"] == 0
    if accepts:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            print(listener.getsockname()[1], flush=True)
            sock = listener.accept()[0]
    else:
        sock = socket.create_connection(("127.0.0.1", spec["port"]))
    stream = Stream(sock, spec["shape"])
    stage("before")
    if accepts:
        rounds = 0
        while data := stream.receive(65536):
            rounds += 1
            if rounds == HALF:
                stage("during")
            stream.send(data)
    else:
        for number in range(ROUNDS):
            if number == HALF:
                stage("during")
            data = message(number)
            stream.send(data)
            left = memoryview(data)
            while left:
                part = stream.receive(65536)
                assert part, f"the other end closed in round {number}"
                assert part == left[: len(part)], f"round {number} came back changed"
                left = left[len(part) :]
        print("done", flush=True)
        sys.stdin.readline()
    stream.close()
    # Looking would be fatal under a filter that kills.
    kills = any(rule[1] == "KILL" for each in spec["filters"] for rule in each["rules"])
    print(json.dumps([] if kills else left_over(before)), flush=True)
    sys.stdin.read()


main()
