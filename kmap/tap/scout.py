# SPDX-License-Identifier: Apache-2.0
"""A child process that looks for processes with the library.

Reading what /proc has of a process with thousands of connections takes a while, in
which the bytes of others would be overwritten; so somebody else does it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kmap import procfs, wire

_SWEEP_S = 0.05
# A look at a process comes again after so many times as long as the last one took, so
# that it takes a fiftieth of a CPU; and a process without the library, which may become
# another program, after this time.
_COST = 50
_AGAIN_S = 0.25


@dataclass(frozen=True)
class Found:
    """A process has a statistics file."""

    pid: int
    file: procfs.StatisticsFile


@dataclass
class _Looked:
    """The last look at a process."""

    program: str
    again: float
    told: set[tuple[int, int]]


def _is_made(file: procfs.StatisticsFile) -> bool:
    fd = procfs.open_file(file)
    if fd is None:
        return False
    try:
        return wire.is_made(fd)
    finally:
        os.close(fd)


class _Sweeper:
    """What the child does."""

    def __init__(self, tell: Callable[[Any], None]) -> None:
        self._tell = tell
        self._looked: dict[int, _Looked] = {}

    def sweep(self) -> None:
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        for pid in pids:
            # Kernel threads have none, and those of other users are closed.
            with contextlib.suppress(OSError):
                self._look(pid, os.readlink(f"/proc/{pid}/exe"))
        for pid in self._looked.keys() - set(pids):
            del self._looked[pid]
        self._tell(None)

    def _look(self, pid: int, program: str) -> None:
        began = time.monotonic()
        last = self._looked.get(pid)
        if last is None or last.program != program:
            last = self._looked[pid] = _Looked(program, began, set())
        if began < last.again:
            return
        least = _AGAIN_S
        if procfs.has_library(pid):
            least = 0.0 if not last.told else _AGAIN_S
            for file in procfs.open_statistics(pid):
                if file.identity not in last.told and _is_made(file):
                    last.told.add(file.identity)
                    self._tell([pid, *file.identity, file.path])
        now = time.monotonic()
        last.again = now + max(least, _COST * (now - began))


def _child(fd: int) -> None:
    # Ctrl-C goes to both; the parent has to end first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with os.fdopen(fd, "w") as pipe:

        def tell(document: Any) -> None:
            pipe.write(json.dumps(document) + "\n")

        sweeper = _Sweeper(tell)
        with contextlib.suppress(BrokenPipeError):
            while True:
                sweeper.sweep()
                pipe.flush()
                time.sleep(_SWEEP_S)


class Scout:
    """The parent's end."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        # What is buffered must not be written twice.
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                # Nothing of the parent's but standard error and the pipe.
                os.dup2(os.open(os.devnull, os.O_RDWR), 0)
                os.dup2(0, 1)
                os.dup2(writing, 3)
                os.closerange(4, os.sysconf("SC_OPEN_MAX"))
                _child(3)
            finally:
                os._exit(0)
        os.close(writing)
        self._fd = reading
        self._rest = b""

    def wait(self) -> list[Found]:
        """What the first sweep finds."""
        found: list[Found] = []
        while True:
            raw = os.read(self._fd, 1 << 16)
            lines = self._lines(raw)
            found.extend(each for each in lines if each is not None)
            # A sweep that found nothing has an end, too.
            if None in lines or not raw:
                os.set_blocking(self._fd, False)
                return found

    def found(self) -> list[Found]:
        """What was found since.  EOFError: the child has ended."""
        found: list[Found] = []
        with contextlib.suppress(BlockingIOError):
            while raw := os.read(self._fd, 1 << 16):
                found.extend(each for each in self._lines(raw) if each is not None)
            raise EOFError("the process that looks for programs has ended")
        return found

    def _lines(self, raw: bytes) -> list[Found | None]:
        *lines, self._rest = (self._rest + raw).split(b"\n")
        found: list[Found | None] = []
        for document in map(json.loads, lines):
            if document is None:
                found.append(None)
                continue
            pid, device, inode, path = document
            file = procfs.StatisticsFile((device, inode), path)
            found.append(Found(pid, file))
        return found

    def close(self) -> None:
        """Ends the child."""
        os.close(self._fd)
        os.kill(self._pid, signal.SIGTERM)
        os.waitpid(self._pid, 0)
