# SPDX-License-Identifier: Apache-2.0
"""A Redis client that stores values, reads them back and compares every byte.

Arguments: the port, then sizes.  Prints a line of JSON and keeps its connections open
until standard input ends.
"""

from __future__ import annotations

import json
import random
import socket
import sys
import threading
from typing import BinaryIO


def command(*parts: bytes) -> bytes:
    """One command in the protocol of Redis."""
    lines = [b"*%d\r\n" % len(parts)]
    lines += [b"$%d\r\n%s\r\n" % (len(part), part) for part in parts]
    return b"".join(lines)


def reply(stream: BinaryIO) -> bytes | int | list[object] | None:
    """Reads one reply."""
    line = stream.readline()
    if not line.endswith(b"\r\n"):
        raise ConnectionError(f"the reply is cut off: {line[:80]!r}")
    kind, rest = line[:1], line[1:-2]
    if kind == b"+":
        return rest
    if kind == b":":
        return int(rest)
    if kind == b"$":
        if rest == b"-1":
            return None
        value = stream.read(int(rest) + 2)
        if value[-2:] != b"\r\n":
            raise ConnectionError(f"a value of {rest!r} bytes ends in {value[-2:]!r}")
        return value[:-2]
    if kind == b"*":
        return [reply(stream) for _ in range(int(rest))]
    raise ConnectionError(f"not a reply: {line[:80]!r}")


def check(stream: BinaryIO, expected: object, what: str) -> None:
    found = reply(stream)
    if found != expected:
        shown = found[:40] if isinstance(found, bytes) else found
        raise AssertionError(f"{what}: the value differs, it begins with {shown!r}")


def work(link: socket.socket, worker: int, sizes: list[int], moved: list[int]) -> None:
    values = {
        b"%d:%d" % (worker, size): random.Random(size + worker).randbytes(size)
        for size in sizes
    }
    stream = link.makefile("rb")
    # One after the other.
    for key, value in values.items():
        link.sendall(command(b"SET", key, value))
        check(stream, b"OK", f"SET {key!r}")
        link.sendall(command(b"GET", key))
        check(stream, value, f"GET {key!r}")
        link.sendall(command(b"STRLEN", key))
        check(stream, len(value), f"STRLEN {key!r}")
    # All requests before the first reply is read.
    link.sendall(command(b"MGET", *values) + command(b"GET", b"absent") * 100)
    check(stream, list(values.values()), "MGET")
    for _ in range(100):
        check(stream, None, "GET absent")
    # The second writes are cut at odd places.
    for key, value in values.items():
        whole = command(b"APPEND", key, value)
        for start in range(0, len(whole), 77_777):
            link.sendall(whole[start : start + 77_777])
        check(stream, 2 * len(value), f"APPEND {key!r}")
        link.sendall(command(b"GET", key))
        check(stream, value + value, f"GET {key!r} again")
    stream.close()
    moved.append(6 * sum(sizes))


def main() -> None:
    port, *sizes = map(int, sys.argv[1:])
    moved: list[int] = []
    links = [socket.create_connection(("127.0.0.1", port), 30) for _ in range(3)]
    threads = [
        threading.Thread(target=work, args=(link, number, sizes, moved))
        for number, link in enumerate(links)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"workers": len(moved), "bytes": sum(moved)}), flush=True)
    sys.stdin.read()
    for link in links:
        link.close()


if __name__ == "__main__":
    main()
