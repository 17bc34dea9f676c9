# SPDX-License-Identifier: Apache-2.0
"""Keep-alive clients that fetch files until they are told to stop.

A program of its own, so that it can be under Kmap.  Each line on standard input is
answered with one JSON document of what happened so far; at its end the clients finish
the request they are at, and the last document is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import sys
import threading
from pathlib import Path

_TIMEOUT_S = 20.0


class Counts:
    """What all clients saw."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.good = 0
        self.statuses: dict[str, int] = {}
        self.closes = 0
        # Clients that have seen 503 at least once.
        self.refused: set[int] = set()
        self.errors: list[str] = []
        self.wrong_bodies: list[str] = []

    def document(self) -> str:
        """All of it in one line."""
        with self.lock:
            return json.dumps(
                {
                    "good": self.good,
                    "statuses": self.statuses,
                    "closes": self.closes,
                    "refused": len(self.refused),
                    "errors": self.errors,
                    "wrong_bodies": self.wrong_bodies,
                }
            )


def fetch(port: int, files: list[Path], counts: Counts, stop: threading.Event) -> None:
    """One client: a connection that is made anew when the server closed it."""
    digests = {path: hashlib.sha256(path.read_bytes()).digest() for path in files}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    number = 0
    while not stop.is_set():
        path = files[number % len(files)]
        number += 1
        try:
            connection.request("GET", f"/{path.name}")
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            with counts.lock:
                counts.errors.append(f"{path.name}: {type(error).__name__}: {error}")
            # A server that is gone must not be asked as fast as the CPU allows.
            stop.wait(0.01)
            continue
        good = response.status == 200
        wrong = good and hashlib.sha256(body).digest() != digests[path]
        with counts.lock:
            status = str(response.status)
            counts.statuses[status] = counts.statuses.get(status, 0) + 1
            counts.closes += response.will_close
            counts.good += good and not wrong
            if status == "503":
                counts.refused.add(threading.get_ident())
            if wrong:
                counts.wrong_bodies.append(f"{path.name}: {len(body)} bytes")
        if not good:
            stop.wait(0.01)
    connection.close()


def main() -> None:
    """Runs the clients until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--connections", type=int, default=4)
    args = parser.parse_args()
    files = sorted(args.directory.iterdir())
    counts, stop = Counts(), threading.Event()
    clients = [
        threading.Thread(target=fetch, args=(args.port, files, counts, stop))
        for _ in range(args.connections)
    ]
    for client in clients:
        client.start()
    for _ in sys.stdin:
        print(counts.document(), flush=True)
    stop.set()
    for client in clients:
        client.join()
    print(counts.document(), flush=True)


if __name__ == "__main__":
    main()
