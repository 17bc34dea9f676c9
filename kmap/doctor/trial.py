# SPDX-License-Identifier: Apache-2.0
"""A program for the doctor to run under Kmap: both ends of one busy connection.

Prints "ready" after its round trips and then waits for the end of its standard input,
so that its statistics can be read.  Needs the standard library only.
"""

from __future__ import annotations

import socket
import sys
import threading

ROUND_TRIPS = 64
_SIZE = 512
_TIMEOUT_S = 10.0


def _receive(sock: socket.socket, size: int) -> None:
    while size:
        part = sock.recv(size)
        if not part:
            raise ConnectionError("the other end closed")
        size -= len(part)


def _echo(listener: socket.socket, done: threading.Event) -> None:
    server, _ = listener.accept()
    with server:
        server.settimeout(_TIMEOUT_S)
        for _ in range(ROUND_TRIPS):
            _receive(server, _SIZE)
            server.sendall(bytes(_SIZE))
        done.wait()


def main() -> None:
    """One connection to itself."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_echo, args=(listener, done), daemon=True)
        thread.start()
        with socket.create_connection(listener.getsockname(), _TIMEOUT_S) as client:
            for _ in range(ROUND_TRIPS):
                client.sendall(bytes(_SIZE))
                _receive(client, _SIZE)
            print("ready", flush=True)
            sys.stdin.read()
        done.set()
        thread.join()


if __name__ == "__main__":
    main()
