# SPDX-License-Identifier: Apache-2.0
"""A child process that sets and clears O_NONBLOCK on its parent's connection."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import struct
import termios

_LONGEST_PAUSE_MS = 3


def flip(fd: int, stop: int, report: int, rng: random.Random) -> None:
    """Changes the flag until a byte comes from stop; then reports how often."""
    poll = select.poll()
    poll.register(stop, select.POLLIN)
    count = 0
    while not poll.poll(rng.randint(0, _LONGEST_PAUSE_MS)):
        on = count % 2 == 0
        if rng.random() < 0.5:
            fcntl.ioctl(fd, termios.FIONBIO, struct.pack("i", on))
        else:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            flags = flags | os.O_NONBLOCK if on else flags & ~os.O_NONBLOCK
            fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        count += 1
    os.write(report, struct.pack("=Q", count))


class Flipper:
    """The child, seen from its parent."""

    def __init__(self, pid: int, stop: int, report: int) -> None:
        self._pid = pid
        self._stop = stop
        self._report = report
        self._owner = os.getpid()

    def dismiss(self) -> int:
        """Ends it; how often it changed the flag.  Does nothing in other processes."""
        if self._owner != os.getpid() or self._pid == 0:
            return 0
        with contextlib.suppress(BrokenPipeError):
            os.write(self._stop, b"x")
        # Other children may hold the pipe, too, so its end says nothing.
        raw = os.read(self._report, 8)
        os.waitpid(self._pid, 0)
        self._pid = 0
        os.close(self._stop)
        os.close(self._report)
        return struct.unpack("=Q", raw)[0] if raw else 0
