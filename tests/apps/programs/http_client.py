# SPDX-License-Identifier: Apache-2.0
"""An HTTP client with persistent connections; prints digests of what it received.

The argument is a JSON object: port, connections, and requests as lists of method,
path and the name of a file to send or null.  Each connection has a thread and makes
all requests in order.  The connections stay open until standard input ends.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import sys
import threading
from typing import Any


class Connection(http.client.HTTPConnection):
    """Counts how often it had to connect."""

    connects = 0

    def connect(self) -> None:
        self.connects += 1
        super().connect()


def work(connection: Connection, plan: Any, answers: list[Any]) -> None:
    for method, path, upload in plan["requests"]:
        content = None
        if upload is not None:
            with open(upload, "rb") as file:
                content = file.read()
        connection.request(method, path, body=content)
        response = connection.getresponse()
        digest = hashlib.sha256()
        while chunk := response.read(100_000):
            digest.update(chunk)
        answers.append([method, path, response.status, digest.hexdigest()])


def main() -> None:
    plan = json.loads(sys.argv[1])
    answers: list[Any] = []
    connections = [
        Connection("127.0.0.1", plan["port"], timeout=30)
        for _ in range(plan["connections"])
    ]
    threads = [
        threading.Thread(target=work, args=(connection, plan, answers))
        for connection in connections
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    connects = sum(connection.connects for connection in connections)
    print(json.dumps({"connects": connects, "answers": answers}), flush=True)
    sys.stdin.read()
    for connection in connections:
        connection.close()


if __name__ == "__main__":
    main()
