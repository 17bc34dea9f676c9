# SPDX-License-Identifier: Apache-2.0
"""The victim: sends back what it gets, on every connection, in one of three shapes.

    echo.py thread|poll|epoll [UID]

Becomes that user.  Prints its port, then a line for each connection that ended: how.
A line "PORT" on standard input makes it connect there and treat that connection like
the others.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import sys
import threading
from collections.abc import Callable


def say(text: str) -> None:
    """One line, whole, whichever thread says it."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def turn(sock: socket.socket) -> str:
    """Sends back one piece; how the connection ended, or nothing."""
    try:
        data = sock.recv(65536)
        if data:
            sock.sendall(data)
            return ""
    except BlockingIOError:
        return ""
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "end"


def serve(sock: socket.socket) -> None:
    """A connection with a thread of its own, which blocks in recv."""
    how = ""
    while not how:
        how = turn(sock)
    sock.close()
    say(f"gone {how}")


def threads(listener: socket.socket) -> None:
    """One thread for each connection."""

    def accept() -> None:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=serve, args=(sock,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    for line in sys.stdin:
        sock = socket.create_connection(("127.0.0.1", int(line)))
        threading.Thread(target=serve, args=(sock,), daemon=True).start()


def events(
    listener: socket.socket,
    wait: Callable[[], list[tuple[int, int]]],
    watch: Callable[[int, int], object],
    drop: Callable[[int], object],
) -> None:
    """One loop for all connections."""
    socks: dict[int, socket.socket] = {}

    def take(sock: socket.socket) -> None:
        socks[sock.fileno()] = sock
        watch(sock.fileno(), select.POLLIN)

    watch(0, select.POLLIN)
    watch(listener.fileno(), select.POLLIN)
    while True:
        for fd, _ in wait():
            if fd == 0:
                line = sys.stdin.readline()
                if not line:
                    return
                take(socket.create_connection(("127.0.0.1", int(line))))
            elif fd == listener.fileno():
                take(listener.accept()[0])
            else:
                how = turn(socks[fd])
                if how:
                    drop(fd)
                    socks.pop(fd).close()
                    say(f"gone {how}")


def main() -> None:
    """Runs until standard input ends."""
    # Imports what it needs while it can still be read.
    "localhost".encode("idna")
    if len(sys.argv) > 2:
        os.setgroups([])
        os.setresuid(*[int(sys.argv[2])] * 3)
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    say(str(listener.getsockname()[1]))
    shape = sys.argv[1]
    if shape == "thread":
        threads(listener)
    elif shape == "poll":
        poll = select.poll()
        events(listener, poll.poll, poll.register, poll.unregister)
    else:
        epoll = select.epoll()
        events(listener, epoll.poll, epoll.register, epoll.unregister)


with contextlib.suppress(KeyboardInterrupt):
    main()
