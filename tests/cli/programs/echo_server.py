# SPDX-License-Identifier: Apache-2.0
"""Prints its port, then echoes; ends when its last client has gone."""

from __future__ import annotations

import selectors
import socket


def main() -> None:
    """Serves until the first moment without clients after the first client."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        selector = selectors.DefaultSelector()
        selector.register(listener, selectors.EVENT_READ)
        clients = 0
        while True:
            for key, _ in selector.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if sock is listener:
                    accepted, _ = listener.accept()
                    selector.register(accepted, selectors.EVENT_READ)
                    clients += 1
                    continue
                if data := sock.recv(65536):
                    sock.sendall(data)
                    continue
                selector.unregister(sock)
                sock.close()
                clients -= 1
                if clients == 0:
                    return


main()
