# SPDX-License-Identifier: Apache-2.0
"""The honest connection beside the liar's: pinger.py PORT.

Each line on standard input is sent and waited for, some 20,000 bytes of it; "ok"
follows.
"""

from __future__ import annotations

import socket
import sys

sock = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
sock.settimeout(60)
for line in sys.stdin:
    data = line.encode() * (20000 // len(line))
    sock.sendall(data)
    got = b""
    while len(got) < len(data):
        piece = sock.recv(65536)
        if not piece:
            sys.exit("the victim closed an honest connection")
        got += piece
    sys.stdout.write("ok\n" if got == data else "wrong bytes\n")
    sys.stdout.flush()
