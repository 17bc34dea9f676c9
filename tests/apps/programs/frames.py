# SPDX-License-Identifier: Apache-2.0
"""A blocking threaded server and client that exchange frames of many sizes.

A frame is four bytes of length, most significant first, and that many bytes.  The
server answers each frame with its bytes in reverse order.  BlockingFrames.java does
the same, so that either server can be put before either client.

    frames.py server             prints its port, ends when standard input ends
    frames.py client PORT        prints a line of JSON, and holds its connections open
                                 until standard input ends
"""

from __future__ import annotations

import json
import random
import socket
import socketserver
import struct
import sys
import threading
from io import BufferedIOBase
from typing import Any

THREADS = 4
SIZES = (0, 1, 17, 1000, 4096, 65_537, 300_000, 2_000_000, 5, 70_000, 0, 12)


def exactly(stream: BufferedIOBase, count: int) -> bytes:
    found = stream.read(count)
    if len(found) != count:
        raise ConnectionError(f"the stream ended {count - len(found)} bytes early")
    return found


class Handler(socketserver.StreamRequestHandler):
    """Answers the frames of one connection."""

    def handle(self) -> None:
        while head := self.rfile.read(4):
            frame = exactly(self.rfile, struct.unpack(">I", head)[0])
            self.request.sendall(head + frame[::-1])


class Server(socketserver.ThreadingTCPServer):
    """Waits for its threads when it is closed."""

    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        super().handle_error(request, client_address)
        raise


def serve() -> None:
    with Server(("127.0.0.1", 0), Handler) as server:
        print(server.server_address[1], flush=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        sys.stdin.read()
        server.shutdown()
        thread.join()


def exchange(link: socket.socket, seed: int, moved: list[int]) -> None:
    source = random.Random(seed)
    stream = link.makefile("rb")
    total = 0
    for size in SIZES * 3:
        frame = source.randbytes(size)
        head = struct.pack(">I", size)
        # In two calls, so that the reader meets a frame without its bytes.
        link.sendall(head)
        link.sendall(frame)
        if exactly(stream, 4) != head:
            raise AssertionError("another length came back")
        if exactly(stream, size) != frame[::-1]:
            raise AssertionError(f"other bytes came back, frame of {size}")
        total += 2 * (4 + size)
    moved.append(total)


def request(port: int) -> None:
    links = [socket.create_connection(("127.0.0.1", port)) for _ in range(THREADS)]
    moved: list[int] = []
    threads = [
        threading.Thread(target=exchange, args=(link, number, moved))
        for number, link in enumerate(links)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"threads": len(moved), "bytes": sum(moved)}), flush=True)
    sys.stdin.read()
    for link in links:
        link.shutdown(socket.SHUT_WR)
        if link.recv(1) != b"":
            raise AssertionError("bytes after the last frame")
        link.close()


if __name__ == "__main__":
    if sys.argv[1] == "server":
        serve()
    else:
        request(int(sys.argv[2]))
