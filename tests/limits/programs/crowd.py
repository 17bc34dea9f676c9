# SPDX-License-Identifier: Apache-2.0
"""crowd.py server LIMIT, crowd.py client LIMIT PORT COUNT: many connections at once.

LIMIT is the soft limit of descriptors.  The server prints its port, and echoes.  For
a number on its standard input the client makes so many round trips on one connection
after the other, and prints "done"; both end with the client's standard input.
"""

from __future__ import annotations

import resource
import select
import socket
import sys

ROUND = 64


def serve() -> None:
    """Until all connections that there were are closed."""
    epoll = select.epoll()
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    epoll.register(listener, select.EPOLLIN)
    print(listener.getsockname()[1], flush=True)
    open_now: dict[int, socket.socket] = {}
    while True:
        for fd, _ in epoll.poll():
            if fd == listener.fileno():
                sock, _ = listener.accept()
                sock.setblocking(False)
                epoll.register(sock, select.EPOLLIN)
                open_now[sock.fileno()] = sock
                continue
            data = open_now[fd].recv(4096)
            if data:
                open_now[fd].sendall(data)
                continue
            epoll.unregister(fd)
            open_now.pop(fd).close()
            if not open_now:
                listener.close()
                return


def connect(port: int, count: int) -> None:
    """As many connections, each used in turn."""
    socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
    print("connected", flush=True)
    for line in sys.stdin:
        for number, sock in enumerate(socks):
            for turn in range(int(line)):
                data = number.to_bytes(4, "big") + bytes([turn]) * ROUND
                sock.sendall(data)
                received = b""
                while len(received) < len(data):
                    received += sock.recv(4096)
                assert received == data, f"connection {number}, turn {turn}"
        print("done", flush=True)
    for sock in socks:
        sock.close()


def main() -> None:
    """One end."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), hard))
    if sys.argv[1] == "server":
        serve()
    else:
        connect(int(sys.argv[3]), int(sys.argv[4]))


main()
