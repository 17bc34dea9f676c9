# SPDX-License-Identifier: Apache-2.0
"""Fetches and posts bodies through Envoy and compares them by SHA-256.

Run as a program of its own, so that it can be under Kmap; it prints one JSON
document: {"bodies": n, "bytes": n, "differences": [text, ...]}.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import random
import threading
from pathlib import Path

_TIMEOUT_S = 60.0


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Client(threading.Thread):
    """One keep-alive connection that goes through all bodies, several times."""

    def __init__(self, port: int, files: list[Path], passes: int, seed: int) -> None:
        super().__init__()
        self.port = port
        self.files = files
        self.passes = passes
        self.random = random.Random(seed)
        self.bodies = 0
        self.bytes = 0
        self.differences: list[str] = []

    def run(self) -> None:
        """Does all passes; what goes wrong becomes a difference."""
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.port, timeout=_TIMEOUT_S
        )
        try:
            for number in range(self.passes):
                order = list(self.files)
                # In order first, so that small bodies go by while the connection is
                # young; then every size after every other.
                if number:
                    self.random.shuffle(order)
                for path in order:
                    body = path.read_bytes()
                    self._exchange(connection, "GET", f"/{path.name}", body, None)
                    self._exchange(connection, "POST", "/echo", body, body)
        except Exception as error:
            self.differences.append(f"{type(error).__name__}: {error}")
        finally:
            connection.close()

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        expected: bytes,
        body: bytes | None,
    ) -> None:
        connection.request(method, path, body=body)
        response = connection.getresponse()
        received = bytearray()
        while piece := response.read(self.random.choice((512, 16384, 1 << 20))):
            received += piece
        self.bodies += 1
        self.bytes += len(received) + len(body or b"")
        what = f"{method} {path} of {len(expected)} bytes"
        if response.status != 200:
            self.differences.append(f"{what}: status {response.status}")
        elif _digest(bytes(received)) != _digest(expected):
            first = next(
                (
                    i
                    for i, (a, b) in enumerate(zip(received, expected, strict=False))
                    if a != b
                ),
                min(len(received), len(expected)),
            )
            self.differences.append(
                f"{what}: {len(received)} bytes came back, different from byte {first}"
            )


def main() -> None:
    """Runs the clients and prints what they found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--connections", type=int, default=3)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    files = sorted(args.directory.iterdir(), key=lambda path: path.stat().st_size)
    clients = [
        Client(args.port, files, args.passes, args.seed + number)
        for number in range(args.connections)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    print(
        json.dumps(
            {
                "bodies": sum(client.bodies for client in clients),
                "bytes": sum(client.bytes for client in clients),
                "differences": [d for client in clients for d in client.differences],
            }
        )
    )


if __name__ == "__main__":
    main()
