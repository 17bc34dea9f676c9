# SPDX-License-Identifier: Apache-2.0
"""The client whose request is recorded: one connection, a request for each line.

Run as a program of its own, so that it can be under Kmap: client.py PORT PATH.  It
sends a request for each line on standard input and answers with the bytes of the
response's body, or with what went wrong, on a line of standard output.
"""

from __future__ import annotations

import re
import socket
import sys

_PIECE = 1 << 20
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


def exchange(connection: socket.socket, path: str) -> str:
    """One request and its response."""
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    head, body = b"", 0
    while b"\r\n\r\n" not in head:
        piece = connection.recv(_PIECE)
        if not piece:
            return f"the connection ended after {len(head)} bytes"
        head += piece
    head, _, rest = head.partition(b"\r\n\r\n")
    length = _LENGTH.search(head + b"\r\n")
    if not head.startswith(b"HTTP/1.1 200 ") or length is None:
        return f"the response was {head.splitlines()[0]!r}"
    body = len(rest)
    while body < int(length[1]):
        piece = connection.recv(_PIECE)
        if not piece:
            return f"the body ended after {body} of {int(length[1])} bytes"
        body += len(piece)
    return str(body)


def main() -> None:
    """Serves standard input until it ends."""
    port, path = int(sys.argv[1]), sys.argv[2]
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in sys.stdin:
            print(exchange(connection, path), flush=True)


if __name__ == "__main__":
    main()
