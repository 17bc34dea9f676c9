# SPDX-License-Identifier: Apache-2.0
"""Self-checking streams: each byte follows from the seed, the stream and its position.

All streams of a run are windows on one pseudo-random block that repeats after a prime
number of bytes; a stream's key is where its window starts.  Bytes that are lost,
doubled, swapped or from another stream therefore differ from what is expected, and
sending or checking a megabyte costs one copy or one comparison and no arithmetic.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import random
from typing import Any

PERIOD = 1_048_573
MAX_SEND = 8 * 1024 * 1024
MAX_READ = 1024 * 1024
_SIZE = PERIOD + MAX_SEND


def stream_key(seed: int, *parts: int | str) -> int:
    """Where the window of a stream starts."""
    text = "/".join(str(part) for part in (seed, *parts))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % PERIOD


class Pattern:
    """The block, in a memfd that every worker of a run maps."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, _SIZE, prot=mmap.PROT_READ)
        self._view = memoryview(self._map)
        # bytes.startswith compares in place with memcmp; memoryview does not.
        self._block = bytes(self._view[: PERIOD + MAX_READ])

    @classmethod
    def create(cls, seed: int) -> Pattern:
        """Makes the block of a seed."""
        fd = os.memfd_create("kmap-stress-pattern", os.MFD_CLOEXEC)
        period = random.Random(f"kmap-stress-pattern/{seed}").randbytes(PERIOD)
        copies = -(-_SIZE // PERIOD)
        whole = memoryview((period * copies)[:_SIZE])
        done = 0
        while done < _SIZE:
            done += os.write(fd, whole[done:])
        return cls(fd)

    def offset(self, key: int, position: int) -> int:
        """Where in the memfd the bytes from position on start."""
        return (key + position) % PERIOD

    def slice(self, key: int, position: int, size: int) -> memoryview:
        """The bytes of a stream, without a copy; size is at most MAX_SEND."""
        start = (key + position) % PERIOD
        return self._view[start : start + size]

    def matches(self, key: int, position: int, data: Any) -> bool:
        """Whether data, of at most MAX_READ bytes, is what belongs at position."""
        return self._block.startswith(data, (key + position) % PERIOD)

    def difference(self, key: int, position: int, data: Any) -> str:
        """Where data first differs and how, for a person to read."""
        got = bytes(data)
        want = bytes(self.slice(key, position, len(got)))
        at = next(i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b)
        text = (
            f"byte {position + at} is {got[at : at + 8].hex()}.., "
            f"not {want[at : at + 8].hex()}.. "
            f"(in a read of {len(got)} at {position})"
        )
        # Where the bytes come from says more than that they are wrong.
        found = self._block.find(got[at : at + 16]) if len(got) - at >= 16 else -1
        if found >= 0:
            shift = (found - key - position - at + PERIOD // 2) % PERIOD - PERIOD // 2
            text += f"; these bytes belong {shift:+d} from here"
        return text

    def close(self) -> None:
        """Unmaps the block and closes the memfd."""
        self._view.release()
        self._map.close()
        os.close(self.fd)
