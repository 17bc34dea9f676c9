# SPDX-License-Identifier: Apache-2.0
"""Worker processes of the socket level, seen from the session."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from kmap import launch, native, procfs, wire
from kmap.stress.flow import BREAK_VARIABLE
from kmap.stress.plan import (
    BUDGET,
    DISABLED,
    HUGE_RINGS,
    MAX_CONNECTIONS,
    NO_MEMORY,
    PLAIN,
    SIDES,
    TINY_RINGS,
    settings,
)
from kmap.stress.stream import Pattern
from kmap.stress.traces import native_stacks, threads

Message = dict[str, Any]

_WORDS = 2 * 2 * MAX_CONNECTIONS
_START_S = 30.0
# What a segment counts for in KMAP_MEMORY_LIMIT: its header, and rings as they start.
_SEGMENT_AT_FIRST = 4096 + 2 * 16384
# Settings of this process's environment that are for the workers too.
_KEPT = ("KMAP_LIB_DIR", "KMAP_LOG", BREAK_VARIABLE)


@dataclass(frozen=True)
class RingCounts:
    """What the library of one process says that it did."""

    upgrades: int = 0
    ring_rx: int = 0
    ring_tx: int = 0

    def __sub__(self, before: RingCounts) -> RingCounts:
        return RingCounts(
            self.upgrades - before.upgrades,
            self.ring_rx - before.ring_rx,
            self.ring_tx - before.ring_tx,
        )


class SharedProgress:
    """Positions of the connections of one pair, which both of its workers write."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("kmap-stress-progress", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, _WORDS * 8)
        self._map = mmap.mmap(self.fd, _WORDS * 8)
        self._words = memoryview(self._map).cast("Q")

    def clear(self) -> None:
        for index in range(_WORDS):
            self._words[index] = 0

    def total(self) -> int:
        """Grows with every byte that either side sends or receives."""
        return sum(self._words)

    def end(self, side: str, number: int) -> tuple[int, int]:
        """Bytes sent and received by one end, as it last noted them."""
        base = (SIDES.index(side) * MAX_CONNECTIONS + number) * 2
        return self._words[base], self._words[base + 1]

    def close(self) -> None:
        self._words.release()
        self._map.close()
        os.close(self.fd)


def environment(options: Mapping[str, str], *, kernel: bool) -> dict[str, str]:
    """What a worker runs in."""
    env = launch.without_kmap(os.environ)
    env.update({name: os.environ[name] for name in _KEPT if name in os.environ})
    if kernel:
        return env
    return launch.environment(env, options=options)


def variant_options(
    variant: str, seed: int, job: int, generation: int, side: str
) -> dict[str, str]:
    """Settings of a worker of the variant."""
    if variant == PLAIN:
        return {}
    if variant == DISABLED:
        return {"KMAP_DISABLE": "1"}
    options = settings(seed, job, generation, side)
    if variant == NO_MEMORY:
        options["KMAP_MEMORY_LIMIT"] = "0"
    elif variant == HUGE_RINGS:
        options["KMAP_RING_SIZE"] = str(16 << 20)
        options["KMAP_UPGRADE_AFTER"] = "8"
    elif variant == TINY_RINGS:
        options["KMAP_RING_SIZE"] = "4096"
    elif variant.startswith(BUDGET):
        count = int(variant.removeprefix(BUDGET))
        options["KMAP_MEMORY_LIMIT"] = str(count * _SEGMENT_AT_FIRST)
    return options


class WorkerProcess:
    """A worker of either level: its process, control socket and error output."""

    def __init__(
        self,
        module: str,
        arguments: list[str],
        env: Mapping[str, str],
        fds: tuple[int, ...],
        *,
        label: str,
    ) -> None:
        self.label = label
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control = ours
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - until dispose
        with theirs:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    module,
                    str(theirs.fileno()),
                    *arguments,
                ],
                env=dict(env),
                pass_fds=(theirs.fileno(), *fds),
                stdin=subprocess.DEVNULL,
                stdout=self.errors,
                stderr=self.errors,
            )
        self.pid = self.process.pid
        self._statistics: int | None = None
        self.hello: Message = {}

    def greet(self) -> None:
        """Waits for the worker's first message."""
        self.control.settimeout(_START_S)
        try:
            raw = self.control.recv(1 << 20)
        except TimeoutError:
            raw = b""
        self.control.settimeout(None)
        if not raw:
            raise RuntimeError(
                f"the worker {self.label} did not start: {self.error_text()[-2000:]}"
            )
        self.hello = json.loads(raw)

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Tells the worker; a dead one is noticed elsewhere."""
        with contextlib.suppress(ConnectionError):
            socket.send_fds(self.control, [json.dumps(message).encode()], list(fds))

    def receive(self) -> Message | None:
        """The next message, or None when the worker's end is closed."""
        try:
            raw = self.control.recv(1 << 20)
        except ConnectionError:
            return None
        return json.loads(raw) if raw else None

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def counts(self) -> RingCounts:
        """From the statistics memfd, which is there from the first upgrade on."""
        if self._statistics is None:
            for found in procfs.open_statistics(self.pid):
                # Held open, so that a dead worker can be asked too.
                self._statistics = procfs.open_file(found)
        if self._statistics is None:
            return RingCounts()
        try:
            seen = wire.read_statistics(self._statistics)
        except wire.NotStatistics:
            # It is being made at this moment.
            return RingCounts()
        names = [counter.name for counter in native.counters()]
        values = dict(zip(names, seen.counters, strict=False))
        return RingCounts(
            upgrades=values["upgrades"],
            ring_rx=values["ring_rx_bytes"] + sum(r.ring_rx_bytes for r in seen.rows),
            ring_tx=values["ring_tx_bytes"] + sum(r.ring_tx_bytes for r in seen.rows),
        )

    def rows(self) -> list[str]:
        """Open connections as the library sees them, for a person to read."""
        self.counts()
        if self._statistics is None:
            return []
        return [str(row) for row in wire.read_statistics(self._statistics).rows]

    def error_text(self) -> str:
        """What the worker wrote to its outputs."""
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace")

    def examine(self) -> str:
        """Where every thread of the worker and of its children is."""
        lines = [f"--- {self.label}, pid {self.pid}"]
        for pid in procfs.descendants(self.pid):
            lines.extend(threads(pid))
        with contextlib.suppress(ProcessLookupError):
            before = len(self.error_text())
            for pid in procfs.descendants(self.pid):
                os.kill(pid, signal.SIGUSR1)
            deadline = time.monotonic() + 2
            # The dump has no end mark: it has ended when nothing more comes.
            last = -1
            while time.monotonic() < deadline:
                size = len(self.error_text())
                if size > before and size == last:
                    break
                last = size
                time.sleep(0.1)
        lines.append(self.error_text()[-6000:])
        for pid in procfs.descendants(self.pid):
            lines.append(f"native stacks of {pid}\n{native_stacks(pid)}")
        lines.extend(self.rows())
        lines.extend(_sockets(self.pid))
        return "\n".join(lines)

    def kill(self) -> None:
        """SIGKILL, and nothing else: this is the fault."""
        self.process.kill()

    def status(self) -> int:
        """The exit status of a worker that is gone or about to be."""
        return self.process.wait(timeout=10)

    def dispose(self) -> None:
        """Ends the worker if it has not ended, and frees everything."""
        children = procfs.descendants(self.pid)[1:] if self.alive else []
        self.kill()
        self.process.wait()
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.control.close()
        self.errors.close()
        if self._statistics is not None:
            os.close(self._statistics)
            self._statistics = None


def _sockets(pid: int) -> list[str]:
    """The kernel's view of the connections of a process, of both their ends."""
    found = procfs.process(pid)
    if found is None:
        return []
    every = procfs.tcp_sockets(pid) or []
    mine = {(s.local, s.peer) for s in every if s.inode in found.sockets}
    return [
        f"kernel: {s.local} to {s.peer} state {s.state:#04x} rx {s.rx_queue} "
        f"tx {s.tx_queue} inode {s.inode} fd {found.sockets.get(s.inode, 'elsewhere')}"
        for s in every
        if s.state != procfs.LISTEN
        and ((s.local, s.peer) in mine or (s.peer, s.local) in mine)
    ]


def start_worker(
    level: str,
    side: str,
    pattern: Pattern,
    progress: SharedProgress,
    options: Mapping[str, str],
    *,
    kernel: bool,
) -> WorkerProcess:
    """Starts a worker; greet() waits until it is ready.

    A worker of the ring level has no library in front of its calls: it has the rings.
    """
    bare = kernel or level == "ring"
    text = " ".join(f"{name}={value}" for name, value in sorted(options.items()))
    return WorkerProcess(
        "kmap.stress.rings" if level == "ring" else "kmap.stress.worker",
        [side, str(progress.fd), str(pattern.fd)],
        environment(options, kernel=bare),
        (progress.fd, pattern.fd),
        label=f"{level} {side} ({'no preload' if bare else text})",
    )
