# SPDX-License-Identifier: Apache-2.0
"""web.py ADDRESS: prints its port, then serves HTTP/1.1 until its input ends.

/body/N has a body of N bytes that the path determines; what is posted comes back.
"""

from __future__ import annotations

import http.server
import socket
import sys
import threading


def body(path: str) -> bytes:
    """What the path has."""
    size = int(path.rpartition("/")[2])
    return (path.encode() + b"|").ljust(16, b".") * (size // 16 + 1)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        size = int(self.path.rpartition("/")[2])
        self._answer(body(self.path)[:size])

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])))

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True


def main() -> None:
    """Serves."""
    address = sys.argv[1]
    Server.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with Server((address, 0), Handler) as server:
        print(server.server_address[1], flush=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        sys.stdin.read()
        server.shutdown()


if __name__ == "__main__":
    main()
