# SPDX-License-Identifier: Apache-2.0
"""Talks to itself over TCP, and fails unless the connection moved to a ring.

Needs nothing of the checkout: scripts/dist runs it beside an installed wheel.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from pathlib import Path


def echo(listener: socket.socket) -> None:
    """Sends back what comes on one connection."""
    server, _ = listener.accept()
    with server:
        while data := server.recv(1 << 16):
            server.sendall(data)


def main() -> int:
    """0: every byte came back, and by a ring."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=echo, args=(listener,))
        thread.start()
        with socket.create_connection(listener.getsockname()) as client:
            for n in range(1, 200):
                sent = os.urandom(n * 50)
                client.sendall(sent)
                got = b""
                while len(got) < len(sent):
                    got += client.recv(1 << 16)
                if got != sent:
                    print("other bytes came back", file=sys.stderr)
                    return 1
            maps = Path("/proc/self/maps").read_text()
        thread.join()
    if "/memfd:kmap-segment" not in maps:
        print("the connection stayed on the kernel", file=sys.stderr)
        return 1
    print("by ring")
    return 0


if __name__ == "__main__":
    sys.exit(main())
