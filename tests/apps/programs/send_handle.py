# SPDX-License-Identifier: Apache-2.0
"""A server whose parent answers the first frames and then passes the connection on.

    send_handle.py METHOD FRAMES    prints its port; METHOD is a start method, FRAMES
                                    how many the parent answers itself

The worker gets the descriptor by multiprocessing's send_handle and answers the rest, in
frames as in frames.py.  Ends when standard input ends.
"""

from __future__ import annotations

import multiprocessing
import socket
import struct
import sys
import threading
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any


def exactly(link: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = link.recv(min(count, 1 << 18))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def answer(link: socket.socket) -> None:
    head = exactly(link, 4)
    link.sendall(head + exactly(link, struct.unpack(">I", head)[0])[::-1])


def answer_all(link: socket.socket) -> None:
    with link:
        try:
            while True:
                answer(link)
        except EOFError:
            pass


def work(pipe: Connection) -> None:
    threads = []
    while pipe.recv():
        link = socket.socket(fileno=reduction.recv_handle(pipe))
        threads.append(threading.Thread(target=answer_all, args=(link,)))
        threads[-1].start()
    for thread in threads:
        thread.join()


def main(method: str, frames: int) -> None:
    context: Any = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    worker = context.Process(target=work, args=(theirs,))
    worker.start()
    theirs.close()
    listening = socket.create_server(("127.0.0.1", 0), backlog=64)
    stop = threading.Event()

    def accept() -> None:
        listening.settimeout(0.05)
        while not stop.is_set():
            try:
                link, _ = listening.accept()
            except TimeoutError:
                continue
            link.settimeout(None)
            for _ in range(frames):
                answer(link)
            ours.send(True)
            assert worker.pid is not None
            reduction.send_handle(ours, link.fileno(), worker.pid)
            link.close()

    thread = threading.Thread(target=accept)
    thread.start()
    print(listening.getsockname()[1], flush=True)
    sys.stdin.read()
    stop.set()
    thread.join()
    ours.send(False)
    worker.join()
    sys.exit(worker.exitcode)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
