# SPDX-License-Identifier: Apache-2.0
"""echo_client.py PORT ROUNDS SIZE: round trips, then waits for its standard input.

Prints "ready" when the round trips are done.  Then, for lines on standard input:
"more N" sends N bytes whose echo nobody reads, "fork" makes a child that holds the
connection as long as this process lives, and anything else ends it.
"""

from __future__ import annotations

import os
import socket
import sys


def hold_in_child() -> None:
    """The child ends when the pipe that only its parent can write to is closed."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)


def main() -> None:
    """One connection."""
    port, rounds, size = map(int, sys.argv[1:4])
    with socket.create_connection(("127.0.0.1", port)) as sock:
        for number in range(rounds):
            data = bytes([number % 251]) * size
            sock.sendall(data)
            received = b""
            while len(received) < size:
                part = sock.recv(65536)
                assert part, "the server closed"
                received += part
            assert received == data, f"round {number} came back changed"
        print("ready", flush=True)
        for line in sys.stdin:
            word, _, count = line.strip().partition(" ")
            if word == "more":
                sock.sendall(bytes(int(count)))
                print("sent", flush=True)
            elif word == "fork":
                hold_in_child()
                print("forked", flush=True)
            else:
                break


main()
