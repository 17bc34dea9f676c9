# SPDX-License-Identifier: Apache-2.0
"""both_ends.py: a process with both ends of two connections.

For a number on its standard input it makes so many round trips of SIZE bytes on the
first one and prints "done"; on the second one COLD bytes have gone one way and no more.
"""

from __future__ import annotations

import socket
import sys
import threading

SIZE = 10
COLD = 5


def echo(sock: socket.socket) -> None:
    """Until the other end closes."""
    while data := sock.recv(100):
        sock.sendall(data)


def main() -> None:
    """Until its standard input ends."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        link = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
        cold = socket.create_connection(listener.getsockname())
        cold_far, _ = listener.accept()
    threading.Thread(target=echo, args=(far,), daemon=True).start()
    cold.sendall(bytes(COLD))
    for line in sys.stdin:
        for _ in range(int(line)):
            link.sendall(bytes(SIZE))
            assert len(link.recv(100)) == SIZE
        print("done", flush=True)
    for sock in (link, cold, cold_far):
        sock.close()


if __name__ == "__main__":
    main()
