# SPDX-License-Identifier: Apache-2.0
"""Real programs as child processes, and ways to wait for them without sleeping."""

from __future__ import annotations

import contextlib
import os
import random
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from kmap import procfs
from kmap.demo import programs

PROGRAMS = Path(__file__).parent / "programs"
DEADLINE_S = 30.0
_TICK_S = 0.01

# What the library or the loader says when something is wrong with the library.
_COMPLAINT = re.compile(r"kmap\[\d+\]|^kmap: |libkmap|ld\.so", re.MULTILINE)


def find_program(name: str) -> str:
    """The path of an installed program; skips the test if there is none."""
    found = programs.find_path(name)
    if found is None:
        pytest.skip(f"{name} is not installed; scripts/setup test installs it")
    return found


class Program:
    """One program in a session of its own, its output in two files."""

    def __init__(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str],
        logs: Path,
        cwd: Path | None = None,
        user: str | None = None,
    ) -> None:
        self.argv = [str(argument) for argument in argv]
        self.name = Path(self.argv[0]).name
        self._out = logs / "stdout"
        self._err = logs / "stderr"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                self.argv,
                env=env,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                cwd=cwd,
                start_new_session=True,
                # None leaves user, group and the further groups as they are.
                user=user,
                group=user,
                extra_groups=None if user is None else [],
            )
        self.pid = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)
        self._tree = {self.pid}

    def __str__(self) -> str:
        return (
            f"{' '.join(self.argv)}\nexit {self._process.returncode}\n"
            f"--- stdout\n{self.stdout()[-4000:]}\n"
            f"--- stderr\n{self.stderr()[-4000:]}"
        )

    def stdout(self) -> str:
        """All it has written so far."""
        return self._out.read_text(errors="replace")

    def stderr(self) -> str:
        """All the errors it has written so far."""
        return self._err.read_text(errors="replace")

    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def family(self) -> list[int]:
        """The program and all that it started, as far as that still runs."""
        found = procfs.descendants(self.pid)
        self._tree.update(found)
        return found

    def tick(self) -> None:
        """Lets a little time pass, or none if the program ends."""
        select.select([self._pidfd], [], [], _TICK_S)

    def wait_until(
        self, condition: Callable[[], bool], what: str, seconds: float = DEADLINE_S
    ) -> None:
        """Looks until the condition holds; fails at once when the program ends."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.running(), f"it ended before: {what}\n{self}"
            assert time.monotonic() < deadline, f"not in {seconds:g} s: {what}\n{self}"
            self.tick()

    def wait_listening(self, port: int) -> None:
        """Waits for a listening socket without connecting to it.

        A connection made only to look would be the first one that the server sees.
        """

        def listening() -> bool:
            return any(
                found.state == procfs.LISTEN and found.local.port == port
                for found in procfs.tcp_sockets(self.pid) or ()
            )

        self.wait_until(listening, f"a listening socket on port {port}")

    def wait_line(self, number: int = 1) -> str:
        """A line of its standard output, counted from 1."""
        self.wait_until(
            lambda: self.stdout().count("\n") >= number, f"{number} lines of output"
        )
        return self.stdout().split("\n")[number - 1]

    def write(self, text: str) -> None:
        """Text for its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(text.encode())
        self._process.stdin.flush()

    def close_input(self) -> None:
        """Ends its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def join(self, seconds: float = DEADLINE_S) -> int:
        """Waits for its end; its exit status."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds:g} s\n{self}") from None

    def wait(self, *, exits: int = 0) -> str:
        """Waits for its end; its standard output.  exits is the status expected."""
        assert self.join() == exits, f"expected exit {exits}\n{self}"
        return self.stdout()

    def finish(self, *, exits: int = 0) -> str:
        """Ends its standard input and waits for its end."""
        self.close_input()
        return self.wait(exits=exits)

    def stop(self, number: int = signal.SIGTERM, *, exits: int = 0) -> str:
        """Sends a signal and waits for its end."""
        self.family()
        self._process.send_signal(number)
        return self.wait(exits=exits)

    def kill(self) -> None:
        """Ends it and all that it started, whatever state they are in."""
        self.family()
        if self.running():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            # PostgreSQL gives each of its processes a session of its own.
            for pid in self._tree - {self.pid}:
                if os.path.isdir(f"/proc/{pid}") and _session_of(pid) == pid:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        os.close(self._pidfd)

    def complaint(self) -> str | None:
        """What the library or the loader wrote to its standard error."""
        found = _COMPLAINT.search(self.stderr())
        return f"{found[0]!r} on standard error\n{self}" if found else None


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def python(name: str, *arguments: object) -> list[str]:
    """The command line of one of the Python programs beside these tests."""
    script = str(PROGRAMS / f"{name}.py")
    return [sys.executable, "-W", "error", script, *map(str, arguments)]


Launch = Callable[..., Program]


class Ports:
    """Port numbers that no other test takes meanwhile.

    They are outside the range from which the kernel picks ports of outgoing
    connections, which could otherwise take one between our look and its use.  An
    abstract Unix name marks one as taken for other workers, and vanishes with us.
    """

    def __init__(self) -> None:
        self._marks: list[socket.socket] = []

    def take(self) -> int:
        """A port of the loopback address on which nobody listens."""
        with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
            low, high = map(int, file.read().split())
        candidates = [
            port for port in range(10_000, 65_000) if not low <= port <= high
        ] or list(range(10_000, 65_000))
        for port in random.SystemRandom().sample(candidates, 200):
            mark = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                mark.bind(f"\0kmap-tests-port-{port}")
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            except OSError:
                mark.close()
                continue
            self._marks.append(mark)
            return port
        raise AssertionError("no free port found")

    def close(self) -> None:
        """Lets others take the ports."""
        for mark in self._marks:
            mark.close()
