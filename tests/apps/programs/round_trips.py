# SPDX-License-Identifier: Apache-2.0
"""Round trips of one byte between two processes, each waiting in one way.

    round_trips.py server WAY             prints its port, ends with the connection
    round_trips.py client WAY PORT COUNT  prints "done", ends with standard input

WAY is recv, poll or epoll.
"""

from __future__ import annotations

import select
import socket
import sys
from collections.abc import Callable


def waiter(sock: socket.socket, way: str) -> Callable[[], object]:
    """What waits until the socket is readable, and leaves that to recv if it can."""
    if way == "recv":
        return lambda: None
    sock.setblocking(False)
    if way == "poll":
        poller = select.poll()
        poller.register(sock, select.POLLIN)
        return lambda: poller.poll(10_000)
    epoll = select.epoll()
    epoll.register(sock, select.EPOLLIN)
    return lambda: epoll.poll(10)


def main() -> None:
    role, way, *rest = sys.argv[1:]
    if role == "server":
        with socket.create_server(("127.0.0.1", 0)) as listener:
            print(listener.getsockname()[1], flush=True)
            sock, _ = listener.accept()
        wait = waiter(sock, way)
        while True:
            wait()
            if not (byte := sock.recv(1)):
                return
            sock.sendall(byte)
    port, count = map(int, rest)
    sock = socket.create_connection(("127.0.0.1", port))
    wait = waiter(sock, way)
    for number in range(count):
        byte = bytes([number & 255])
        sock.sendall(byte)
        wait()
        if sock.recv(1) != byte:
            raise AssertionError(f"byte {number} came back as another")
    print("done", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
