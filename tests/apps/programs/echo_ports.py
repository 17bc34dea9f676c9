# SPDX-License-Identifier: Apache-2.0
"""echo_ports.py PORT...: sends back what it gets, on several ports of 127.0.0.1.

Prints "ready" when it listens on all of them.
"""

from __future__ import annotations

import socket
import sys
import threading


def serve(connection: socket.socket) -> None:
    """One connection, to its end."""
    with connection:
        while data := connection.recv(65536):
            connection.sendall(data)


def accept(listener: socket.socket) -> None:
    """All connections of one port."""
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()


def main() -> None:
    """Listens until standard input ends."""
    for port in map(int, sys.argv[1:]):
        listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()


main()
