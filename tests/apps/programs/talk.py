# SPDX-License-Identifier: Apache-2.0
"""talk.py TEXT PORT...: a connection to each port of 127.0.0.1, kept open.

Sends TEXT a hundred times on each, and waits for an answer each time.  Prints for each
port how many bytes came back in all, and ends with its standard input.
"""

from __future__ import annotations

import contextlib
import socket
import sys

ROUNDS = 100


def answer(sock: socket.socket, least: int) -> int:
    """Reads at least so many bytes; how many they were."""
    got = 0
    while got < least:
        data = sock.recv(65536)
        assert data, "the connection was closed"
        got += len(data)
    return got


def main() -> None:
    """All connections, one after the other."""
    text = sys.argv[1].encode().decode("unicode_escape").encode()
    with contextlib.ExitStack() as exits:
        for port in map(int, sys.argv[2:]):
            sock = exits.enter_context(socket.create_connection(("127.0.0.1", port)))
            total = 0
            for _ in range(ROUNDS):
                sock.sendall(text)
                total += answer(sock, len(text))
            print(port, total, flush=True)
        sys.stdin.read()


main()
