# SPDX-License-Identifier: Apache-2.0
"""numbers.py serve | numbers.py connect PORT: streams that say where each byte belongs.

Byte n of a stream is byte n % 8 of the 64-bit big-endian number n // 8.  Both ends send
such a stream and read the other's.  For each line "send N SEED [PIECE]" on its input an
end sends N more bytes in pieces of random sizes, up to PIECE, and prints the length of
its stream; "read N" reads and checks until it has N bytes, and prints that; "fault"
makes a send fail half-way, in a bad buffer, and prints its errno; "close" closes.
"""

from __future__ import annotations

import ctypes
import mmap
import random
import socket
import struct
import sys


def numbers(start: int, size: int) -> bytes:
    """A piece of the stream."""
    first, last = start // 8, (start + size) // 8 + 1
    raw = struct.pack(f">{last - first}Q", *range(first, last))
    return raw[start % 8 : start % 8 + size]


class Libc:
    def __init__(self) -> None:
        self._lib = ctypes.CDLL(None, use_errno=True)
        self._lib.send.argtypes = [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
        ]

    def half_send(self, sock: socket.socket) -> int:
        """Sends two pages, of which the second is not there."""
        pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
        pages[: mmap.PAGESIZE] = b"\xee" * mmap.PAGESIZE
        view = ctypes.c_char.from_buffer(pages)
        address = ctypes.addressof(view)
        self._lib.mprotect(
            ctypes.c_void_p(address + mmap.PAGESIZE),
            ctypes.c_size_t(mmap.PAGESIZE),
            0,
        )
        sent = self._lib.send(sock.fileno(), address, 2 * mmap.PAGESIZE, 0)
        assert sent == -1, sent
        return ctypes.get_errno()


def serve() -> socket.socket:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        return listener.accept()[0]


def main() -> None:
    """Does what it is told."""
    if sys.argv[1] == "serve":
        sock = serve()
    else:
        sock = socket.create_connection(("127.0.0.1", int(sys.argv[2])))
    sent = received = 0
    for line in sys.stdin:
        words = line.split()
        if words[0] == "send":
            source = random.Random(int(words[2]))
            most = int(words[3]) if len(words) > 3 else 20_000
            end = sent + int(words[1])
            while sent < end:
                size = min(source.randint(1, most), end - sent)
                sock.sendall(numbers(sent, size))
                sent += size
            print(sent, flush=True)
        elif words[0] == "read":
            while received < int(words[1]):
                part = sock.recv(65536)
                assert part, "it was closed"
                assert part == numbers(received, len(part)), received
                received += len(part)
            print(received, flush=True)
        elif words[0] == "fault":
            print(Libc().half_send(sock), flush=True)
        else:
            sock.close()
            print("closed", flush=True)


if __name__ == "__main__":
    main()
