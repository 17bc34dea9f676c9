# SPDX-License-Identifier: Apache-2.0
"""memory.py: makes connections to itself as it is told, line by line.

"open COUNT" makes connections and uses them; "talk SIZE" sends so much both ways on
each; "close INDEX" closes one; "numbers" says the descriptors of both ends of each.
Each line is answered with one of JSON; the program ends with its standard input.
"""

from __future__ import annotations

import json
import socket
import sys
import threading

ROUNDS = 6
Ends = tuple[socket.socket, socket.socket]


def receive(sock: socket.socket, size: int) -> None:
    while size:
        part = sock.recv(min(size, 65536))
        assert part
        assert part == b"x" * len(part)
        size -= len(part)


def talk(ends: Ends, size: int) -> None:
    for one, other in (ends, ends[::-1]):
        if size < 65536:
            one.sendall(b"x" * size)
            receive(other, size)
            continue
        sender = threading.Thread(target=one.sendall, args=(b"x" * size,))
        sender.start()
        receive(other, size)
        sender.join()


def main() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    pairs: list[Ends] = []
    for line in sys.stdin:
        word, *arguments = line.split()
        answer: object = None
        if word == "open":
            for _ in range(int(arguments[0])):
                client = socket.create_connection(listener.getsockname())
                pairs.append((client, listener.accept()[0]))
                for _ in range(ROUNDS):
                    talk(pairs[-1], 100)
        elif word == "talk":
            for ends in pairs:
                talk(ends, int(arguments[0]))
        elif word == "close":
            for sock in pairs.pop(int(arguments[0])):
                sock.close()
        else:
            answer = [[sock.fileno() for sock in ends] for ends in pairs]
        print(json.dumps(answer), flush=True)
    for sock in (listener, *(sock for ends in pairs for sock in ends)):
        sock.close()


main()
