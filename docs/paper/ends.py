# SPDX-License-Identifier: Apache-2.0
"""Descriptors that a process holds for one end of a connection."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import psutil

from kmap import launch

CONNECTIONS = 50
_PINGS = 12


def serve(count: int) -> None:
    """One side: accepts connections of a child and prints what it holds for each."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=count)
    child = os.fork()
    if child == 0:
        _client(listener.getsockname()[1], count)
        os._exit(0)
    before = psutil.Process().num_fds()
    socks = [listener.accept()[0] for _ in range(count)]
    for _ in range(_PINGS):
        for sock in socks:
            sock.sendall(sock.recv(64))
    after = psutil.Process().num_fds()
    print((after - before) / count)
    for sock in socks:
        sock.close()
    os.waitpid(child, 0)


def _client(port: int, count: int) -> None:
    socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
    for _ in range(_PINGS):
        for sock in socks:
            sock.sendall(b"x" * 64)
        for sock in socks:
            assert sock.recv(64)
    # Until the other side has looked.
    for sock in socks:
        assert sock.recv(1) == b""


def cost(transport: str) -> dict[str, float]:
    """Of an end of a connection on that transport, or on the kernel."""
    environment = launch.without_kmap(os.environ)
    if transport != "kernel":
        environment = launch.environment(
            {**os.environ, "KMAP_TRANSPORT": transport, "KMAP_UPGRADE_AFTER": "1"}
        )
    done = subprocess.run(
        [sys.executable, "-m", "docs.paper.ends"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    return {"descriptors": round(float(done.stdout), 2)}


if __name__ == "__main__":
    serve(CONNECTIONS)
