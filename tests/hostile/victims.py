# SPDX-License-Identifier: Apache-2.0
"""The victim of tests/hostile, with an honest connection beside the liar's."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from kmap import native, procfs
from tests.hostile.liar import Liar, until

PROGRAMS = Path(__file__).parent / "programs"
Spawn = Callable[..., "subprocess.Popen[str]"]


class Victim:
    """echo.py under Kmap, and what can be seen of it from outside."""

    def __init__(
        self,
        spawn: Spawn,
        env: Mapping[str, str],
        directory: Path,
        shape: str,
        user: int | None = None,
    ) -> None:
        self.log = directory / "kmap.log"
        self.log.touch()
        self._environment = {
            **env,
            "KMAP_LOG": f"error:{self.log}",
            "KMAP_UPGRADE_AFTER": "1",
            "KMAP_RING_SIZE": "65536",
        }
        self.process = spawn(
            [
                sys.executable,
                "-S",
                str(PROGRAMS / "echo.py"),
                shape,
                *([] if user is None else [str(user)]),
            ],
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.port = int(self.line())
        self._names = [named.name for named in native.counters()]
        self._reasons = [named.name for named in native.reasons()]
        self._pinger = spawn(
            [sys.executable, "-S", str(PROGRAMS / "pinger.py"), str(self.port)],
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        until("the honest connection to be upgraded", self._is_upgraded)
        assert self.counter("upgrades") == 1, "the honest connection is not upgraded"

    def _is_upgraded(self) -> bool:
        self.honest()
        return self.ring_bytes() >= 20000

    def line(self) -> str:
        """The next line that it says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the victim has ended"
        return line.strip()

    def honest(self) -> None:
        """The honest connection still carries bytes, by its rings."""
        before = self.ring_bytes()
        assert self._pinger.stdin is not None
        assert self._pinger.stdout is not None
        self._pinger.stdin.write("the quick brown fox\n")
        self._pinger.stdin.flush()
        assert self._pinger.stdout.readline() == "ok\n"
        assert self.process.poll() is None, "the victim has ended"
        # The first ones may go by the kernel in part.
        assert self.ring_bytes() >= before + (20000 if before >= 20000 else 0)

    def ring_bytes(self) -> int:
        """What the ring of the busiest connection, which is the honest one, carried."""
        return max(
            (
                row.ring_rx_bytes
                for file in procfs.open_statistics(self.process.pid)
                if (found := procfs.read_statistics(file))
                for row in found.rows
            ),
            default=0,
        )

    def _numbers(self, reasons: bool) -> dict[str, int]:
        names = self._reasons if reasons else self._names
        total = dict.fromkeys(names, 0)
        for file in procfs.open_statistics(self.process.pid):
            found = procfs.read_statistics(file)
            if found is not None:
                values = found.reasons if reasons else found.counters
                for name, value in zip(names, values, strict=False):
                    total[name] += value
        return total

    def counter(self, name: str) -> int:
        """One of counters.def."""
        return self._numbers(reasons=False)[name]

    def reason(self, name: str) -> int:
        """How often a connection stayed on the kernel for it, of reasons.def."""
        return self._numbers(reasons=True)[name]

    def log_lines(self) -> list[str]:
        """What the library has said."""
        return self.log.read_text().splitlines()

    def descriptors(self) -> list[str]:
        """What it has open, but for what a thread opens to sleep.

        That is a signalfd for the sleep and an epoll set for the thread's life.
        """
        directory = f"/proc/{self.process.pid}/fd"
        found, of_sleepers = [], 0
        for name in os.listdir(directory):
            with contextlib.suppress(OSError):
                what = os.readlink(f"{directory}/{name}")
                if what in ("anon_inode:[signalfd]", "anon_inode:[eventpoll]"):
                    of_sleepers += 1
                else:
                    found.append(what.split(":")[0])
        threads = len(os.listdir(f"/proc/{self.process.pid}/task"))
        # One more is the program's own.
        assert of_sleepers <= 2 * threads + 1, "a wait has left its descriptors open"
        return sorted(found)

    def segments(self) -> int:
        """Mappings of segments and of peers' bells."""
        maps = Path(f"/proc/{self.process.pid}/maps").read_text()
        return maps.count("memfd:kmap-segment") + maps.count("memfd:liar")

    def cpu_s(self) -> float:
        """CPU time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().split(") ")[1]
        ticks = fields.split()[11:13]
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    @contextlib.contextmanager
    def liar(self, *, connects: bool) -> Iterator[Liar]:
        """A hostile connection to it, made by either side."""
        with self.connection(connects=connects) as tcp:
            liar = Liar(tcp, connects=connects)
            try:
                yield liar
            finally:
                liar.close()

    @contextlib.contextmanager
    def connection(self, *, connects: bool) -> Iterator[socket.socket]:
        """A connection to it that nothing honest is at the other end of."""
        if connects:
            tcp = socket.create_connection(("127.0.0.1", self.port))
        else:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                assert self.process.stdin is not None
                self.process.stdin.write(f"{listener.getsockname()[1]}\n")
                self.process.stdin.flush()
                tcp, _ = listener.accept()
        with tcp:
            yield tcp

    def finds_out(self, liar: Liar, number: int, lie: str) -> None:
        """That liar is the only one to suffer; it is the victim's number-th."""
        liar.nudge()
        assert self.line() == "gone ECONNRESET", lie
        until("the end of the connection", liar.gone)
        assert self.counter("protocol_resets") == number, lie
        assert len(self.log_lines()) == number, self.log_lines()
        self.honest()

    def settled(self, descriptors: list[str], segments: int) -> None:
        """Nothing of closed connections is left in it."""
        until(
            f"{descriptors} open and {segments} segments mapped, not "
            f"{self.descriptors()} and {self.segments()}",
            lambda: self.descriptors() == descriptors and self.segments() == segments,
        )
