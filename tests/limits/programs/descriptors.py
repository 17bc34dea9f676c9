# SPDX-License-Identifier: Apache-2.0
"""descriptors.py SOFT HARD ORDER: how many descriptors a program gets.

It has both ends of its connections.  ORDER is what it does before it opens all that it
can: nothing; "used", makes a connection and uses it; "lowered", the same under a higher
limit, which it lowers then; "threads", as used, with a thread asleep in poll on it.
Afterwards it gives a few back, makes another connection with them and uses it, takes
the rest again, and does the same with all of them.

Prints what it got as JSON, and the inode of each connection's ends, then waits for its
standard input to end.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import socket
import sys
import threading
from collections.abc import Callable

ROUNDS = 6
# Numbers that it gives back; a connection takes two of them.
FEW = 6
# Of poll and ppoll, on x86-64 and arm64.
POLL_NUMBERS = {"7", "271", "73"}
Ends = tuple[socket.socket, socket.socket]


def connect(listener: socket.socket) -> Ends:
    client = socket.create_connection(listener.getsockname())
    return client, listener.accept()[0]


def talk(ends: Ends) -> None:
    for number in range(ROUNDS):
        for one, other in (ends, ends[::-1]):
            one.sendall(bytes([number]) * 1000)
            received = b""
            while len(received) < 1000:
                received += other.recv(4096)
            assert received == bytes([number]) * 1000


def fill(make: Callable[[], int]) -> list[int]:
    """Opens until it is told that there are too many."""
    got = []
    while True:
        try:
            got.append(make())
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            return got


def open_file() -> int:
    return os.open("/dev/null", os.O_RDONLY)


def open_socket() -> int:
    return socket.socket(socket.AF_INET, socket.SOCK_STREAM).detach()


def inodes(ends: Ends) -> list[int]:
    return [os.fstat(sock.fileno()).st_ino for sock in ends]


def sleeper(sock: socket.socket) -> threading.Thread:
    """Asleep in poll until sock has something."""

    def wait() -> None:
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        assert poll.poll() == [(sock.fileno(), select.POLLIN)]

    thread = threading.Thread(target=wait)
    thread.start()
    path = f"/proc/self/task/{thread.native_id}/syscall"
    while True:
        with open(path) as file:
            if file.read().split()[0] in POLL_NUMBERS:
                return thread


def main() -> None:
    soft, hard, order = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    first = min(hard, 4 * soft) if order == "lowered" else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (first, hard))
    listener = socket.create_server(("127.0.0.1", 0))
    old = connect(listener)
    if order != "nothing":
        talk(old)
    thread = sleeper(old[1]) if order == "threads" else None
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    files = fill(open_file)
    assert fill(open_file) == []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if thread is not None:
        old[0].sendall(b"x")
        thread.join()
        assert old[1].recv(1) == b"x"
    talk(old)
    for fd in files[-FEW:]:
        os.close(fd)
    new = connect(listener)
    talk(new)
    files[-FEW:] = fill(open_file)
    talk(old)
    talk(new)
    for fd in files:
        os.close(fd)
    sockets = fill(open_socket)
    for fd in sockets:
        os.close(fd)
    newest = connect(listener)
    talk(newest)
    again = fill(open_file)
    found = {"limits": limits, "files": files, "sockets": sockets, "again": again}
    found |= {"old": inodes(old), "new": inodes(new), "newest": inodes(newest)}
    print(json.dumps(found), flush=True)
    sys.stdin.read()
    for sock in (*old, *new, *newest, listener):
        sock.close()


main()
