# SPDX-License-Identifier: Apache-2.0
"""The webhook's HTTPS server.

One thread for each connection, at most :data:`MOST_CONNECTIONS` of them; who stalls is
cut off after :data:`PATIENCE_S`.  The certificate is read again when its files change,
as cert-manager changes them, for connections that come afterwards.

========================== ========= ==================================================
path                       method    does
========================== ========= ==================================================
``/mutate``                POST      injects pods that say so
``/mutate/namespace``      POST      injects pods that do not forbid it
``/healthz``               GET       200 while the server takes requests
========================== ========= ==================================================
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any

from kmap.kubernetes.admission import BadRequest, answer
from kmap.kubernetes.pods import Options

# A review has one object, and the API server stores none above 1.5 MiB.
LARGEST_BODY = 4 << 20
MOST_CONNECTIONS = 64
# For each read and write of a request or a handshake, and for the next request.
PATIENCE_S = 10.0
IDLE_S = 90

MUTATE = "/mutate"
MUTATE_NAMESPACE = "/mutate/namespace"
HEALTH = "/healthz"

Log = Callable[[str], None]


class BadCertificate(Exception):
    """The certificate or its key cannot be used; the message names the file."""


class Certificate:
    """A certificate and its key in files, read again when these change."""

    def __init__(self, cert: Path, key: Path, log: Log) -> None:
        self._cert, self._key, self._log = cert, key, log
        self._lock = threading.Lock()
        self._seen = self._look()
        self._context = self._load()

    def context(self) -> ssl.SSLContext:
        """The newest one that works."""
        with self._lock:
            seen = self._look()
            if seen != self._seen:
                # Whatever comes of it: files that are half written change again.
                self._seen = seen
                try:
                    self._context = self._load()
                    self._log("the certificate was read again")
                except BadCertificate as error:
                    self._log(f"{error}; the certificate of before goes on")
            return self._context

    def _look(self) -> tuple[tuple[int, int, int] | None, ...]:
        found: list[tuple[int, int, int] | None] = []
        for path in (self._cert, self._key):
            try:
                status = os.stat(path)
            except OSError:
                found.append(None)
            else:
                found.append((status.st_ino, status.st_mtime_ns, status.st_size))
        return tuple(found)

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        for path in (self._cert, self._key):
            try:
                path.read_bytes()
            except OSError as error:
                raise BadCertificate(f"{path}: {error.strerror}") from error
        try:
            # A key with a password would be asked for at the terminal.
            context.load_cert_chain(self._cert, self._key, password=_no_password)
        except (ssl.SSLError, ValueError) as error:
            raise BadCertificate(
                f"{self._cert} and {self._key} are no certificate and its key: {error}"
            ) from error
        return context


def _no_password() -> str:
    raise ValueError("the key has a password: store it without")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = PATIENCE_S
    server: Server

    def setup(self) -> None:
        if not self.server.wait_for(self.request):
            raise ConnectionAbortedError
        self.request.settimeout(self.timeout)
        # Here, in the connection's own thread: a client that stalls in the handshake
        # holds up nobody else.
        context = self.server.certificate.context()
        self.request = context.wrap_socket(self.request, server_side=True)
        super().setup()

    def finish(self) -> None:
        """Says that it is over, and waits for no answer to that."""
        super().finish()
        with contextlib.suppress(OSError, ValueError):
            self.request.settimeout(0)
            self.request.unwrap()
        self.request.close()

    def handle_one_request(self) -> None:
        """Waits for a request until the server ends."""
        if self._has_bytes() or self.server.wait_for(self.request):
            super().handle_one_request()
        else:
            self.close_connection = True

    def _has_bytes(self) -> bool:
        """Whether bytes (or the end) have been read from the socket already."""
        self.request.settimeout(0)
        try:
            self.rfile.peek(1)  # type: ignore[attr-defined]
        except ssl.SSLWantReadError:
            return False
        finally:
            self.request.settimeout(self.timeout)
        return True

    def version_string(self) -> str:
        return "kmap-webhook"

    def log_message(self, format: str, *args: Any) -> None:
        """Each review has a line; other requests have none."""

    def _send(self, status: HTTPStatus, document: Any) -> None:
        text = document if isinstance(document, str) else json.dumps(document)
        body = text.encode()
        self.send_response(status)
        plain = isinstance(document, str)
        kind = "text/plain; charset=utf-8" if plain else "application/json"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.server.ending:
            self.close_connection = True
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        # Whatever is left of the request cannot be told from the next one.
        self.close_connection = True
        self.server.log(f"{self.client_address[0]}: {status.value}: {message}")
        self._send(status, f"kmap webhook: {message}\n")

    def do_GET(self) -> None:
        if self.path == HEALTH:
            self._send(HTTPStatus.OK, "ok\n")
        elif self.path in (MUTATE, MUTATE_NAMESPACE):
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, f"{self.path} takes POST")
        else:
            self._refuse(HTTPStatus.NOT_FOUND, f"there is no {self.path}")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        # The API server adds ?timeout=5s.
        path = self.path.partition("?")[0]
        if path not in (MUTATE, MUTATE_NAMESPACE):
            self._refuse(HTTPStatus.NOT_FOUND, f"there is no {path}")
            return
        body = self._body()
        if body is None:
            return
        options = replace(self.server.options, by_default=path == MUTATE_NAMESPACE)
        try:
            made = answer(body, options)
        except BadRequest as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
            return
        self.server.count(made.plan.steps != (), made.warning != "")
        self.server.log(made.line())
        self._send(HTTPStatus.OK, made.document)

    def _body(self) -> bytes | None:
        """The request's body; None after a refusal."""
        kind = self.headers.get_content_type()
        if kind != "application/json":
            status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
            self._refuse(status, f"{kind} is not application/json")
            return None
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            message = "there is no Content-Length"
            self._refuse(HTTPStatus.LENGTH_REQUIRED, message)
            return None
        if len(length) > 12 or int(length) > LARGEST_BODY:
            message = f"{length} bytes are more than {LARGEST_BODY}"
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)
            return None
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            self._refuse(HTTPStatus.BAD_REQUEST, "the body ends too early")
            return None
        return body


class Server(ThreadingMixIn, HTTPServer):
    """Serves until :meth:`end`."""

    daemon_threads = False
    block_on_close = True
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(
        self,
        address: tuple[str, int],
        certificate: Certificate,
        options: Options,
        log: Log,
    ) -> None:
        self.certificate = certificate
        self.options = options
        self.log = log
        self.ending = False
        self.reviews = self.injected = self.warnings = 0
        self._lock = threading.Lock()
        self._room = threading.BoundedSemaphore(MOST_CONNECTIONS)
        # Readable from the moment when the server ends; nobody reads it.
        self._end_read, self._end_write = os.pipe()
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        try:
            super().__init__(address, _Handler)
        except BaseException:
            os.close(self._end_read)
            os.close(self._end_write)
            raise

    def server_bind(self) -> None:
        # HTTPServer would ask a name server for our name here.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name = str(self.server_address[0])
        self.server_port = int(self.server_address[1])

    def count(self, injected: bool, warned: bool) -> None:
        """Counts one review."""
        with self._lock:
            self.reviews += 1
            self.injected += injected
            self.warnings += warned

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts a thread; with too many of them, new connections wait."""
        self._room.acquire()
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """One connection, to its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def wait_for(self, connection: socket.socket) -> bool:
        """Whether something comes before the server ends or patience does."""
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        poll.register(self._end_read, select.POLLIN)
        ready = poll.poll(IDLE_S * 1000)
        return any(fd == connection.fileno() for fd, _ in ready)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that stall, break off or speak no TLS are no news."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # ssl.SSLError and TimeoutError are
            self.log(f"{client_address[0]}: {error!r}")

    def end(self) -> None:
        """Takes no more connections, answers what has come, and returns.

        To be called while another thread is in ``serve_forever``.
        """
        self.ending = True
        os.write(self._end_write, b"x")
        self.shutdown()
        self.server_close()
        os.close(self._end_read)
        os.close(self._end_write)
