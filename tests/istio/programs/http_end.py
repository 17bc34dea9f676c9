# SPDX-License-Identifier: Apache-2.0
"""http_end.py ADDRESS PORT: an HTTP server that sends bodies back, and a client.

Prints "ready" when it listens.  For each line "HOST PORT COUNT SIZE" on standard input
it makes a connection that stays open, posts COUNT bodies of SIZE bytes on it and prints
"COUNT right", or what went wrong.  "again N COUNT SIZE" does so on the connection that
line N made, counted from 0.  It ends with its standard input.
"""

from __future__ import annotations

import http.client
import os
import socket
import sys
import threading
from http.server import ThreadingHTTPServer

from kmap.demo.echo_service import Echo


def call(connection: http.client.HTTPConnection, count: int, size: int) -> str:
    """All requests of one line."""
    for number in range(count):
        body = os.urandom(size)
        headers = {"Content-Type": "application/octet-stream"}
        connection.request("POST", "/", body, headers)
        answer = connection.getresponse()
        got = answer.read()
        if answer.status != 200 or got != body:
            return f"request {number}: {answer.status}, {len(got)} of {size} bytes"
    return f"{count} right"


def main() -> None:
    """Serves in threads; calls in this one."""
    address = (sys.argv[1], int(sys.argv[2]))
    if ":" in address[0]:
        ThreadingHTTPServer.address_family = socket.AF_INET6
    server = ThreadingHTTPServer(address, Echo)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("ready", flush=True)
    connections = []
    for line in sys.stdin:
        host, port, count, size = line.split()
        number = int(port)
        if host != "again":
            connections.append(http.client.HTTPConnection(host, number, timeout=60))
            number = -1
        # Made when it is first used, and never anew.
        connections[number].auto_open = host != "again"
        try:
            said = call(connections[number], int(count), int(size))
        except (OSError, http.client.HTTPException) as error:
            said = f"{type(error).__name__}: {error}"
        print(said, flush=True)


main()
