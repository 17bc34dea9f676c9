# SPDX-License-Identifier: Apache-2.0
"""Child processes that never outlive us, whichever way we leave."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from kmap import procfs
from kmap.results import CommandFailed

_LOG_TAIL = 2000
_CLOSE_S = 3.0


class ChildFailed(CommandFailed):
    """A program that should run ended, or one that should end did not."""


class Child:
    """One program in a session of its own, so that a ^C reaches us alone.

    Standard error, and standard output unless it is taken, go to a log file whose
    tail is part of every error message.  The program works in the log's directory.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        log: Path,
        cpus: Iterable[int] | None = None,
        take_output: bool = False,
        take_input: bool = False,
    ) -> None:
        self.name = name
        self.log = log
        self.usage: resource.struct_rusage | None = None
        before = os.sched_getaffinity(0)
        # Affinity is inherited, so the child has it before its first thread starts.
        if cpus is not None:
            os.sched_setaffinity(0, cpus)
        try:
            with log.open("ab") as file:
                self._process = subprocess.Popen(
                    argv,
                    env=dict(env),
                    stdin=subprocess.PIPE if take_input else subprocess.DEVNULL,
                    stdout=subprocess.PIPE if take_output else file,
                    stderr=file,
                    start_new_session=True,
                    cwd=log.parent,
                )
        finally:
            if cpus is not None:
                os.sched_setaffinity(0, before)
        self._pidfd = os.pidfd_open(self._process.pid)

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code as subprocess has it; None as long as it was not waited for."""
        return self._process.returncode

    @property
    def output(self) -> IO[bytes]:
        """Standard output, if it was taken."""
        assert self._process.stdout is not None
        return self._process.stdout

    def tell(self, line: str) -> None:
        """Writes a line to standard input, if it was taken."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            self.wait(_CLOSE_S)
            raise self.failure("ended early") from None

    def wait(self, timeout: float) -> bool:
        """Whether the process ended within timeout seconds; keeps what it used."""
        if self._process.returncode is not None:
            return True
        waiter = select.poll()
        waiter.register(self._pidfd, select.POLLIN)
        if not waiter.poll(max(0.0, timeout) * 1000):
            return False
        self._reap()
        return True

    def _reap(self) -> None:
        # A parent that crashed leaves its workers behind; as long as it has not been
        # waited for, the number of the group is theirs alone.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        _, status, self.usage = os.wait4(self.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)

    def check(self) -> None:
        """Raises ChildFailed if the process has ended."""
        if self.wait(0):
            raise self.failure(f"ended early with {self.returncode}")

    def failure(self, what: str) -> ChildFailed:
        """An error about this process, with the end of its log."""
        text = ""
        with contextlib.suppress(OSError):
            text = self.log.read_bytes()[-_LOG_TAIL:].decode(errors="replace").strip()
        return ChildFailed(f"{self.name} {what}" + (f":\n{text}" if text else ""))

    def send(self, number: signal.Signals) -> None:
        """Sends a signal if the process has not been waited for."""
        # Until it is waited for, its number cannot belong to another process.
        if self._process.returncode is None:
            self._process.send_signal(number)

    def stop(self, timeout: float, number: signal.Signals = signal.SIGTERM) -> int:
        """Asks the process to end and returns its exit code."""
        self.send(number)
        if not self.wait(timeout):
            raise self.failure(f"did not end within {timeout:g} s of {number.name}")
        self.close()
        assert self.returncode is not None
        return self.returncode

    def close(self) -> None:
        """Ends the process and all it started, if it still runs."""
        if self._process.returncode is None:
            # A parent that is asked first waits for its workers.
            self.send(signal.SIGTERM)
            if not self.wait(_CLOSE_S):
                self._reap()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        if self._process.stdout is not None:
            self._process.stdout.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def family(self) -> list[int]:
        """This process and its descendants."""
        return procfs.descendants(self.pid)

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@contextlib.contextmanager
def none_left() -> Iterator[None]:
    """Kills what was started inside and still runs at the end.

    A signal can arrive between the start of a child and the moment somebody is
    responsible for it.
    """
    before = set(procfs.children(os.getpid()))
    try:
        yield
    finally:
        for pid in set(procfs.children(os.getpid())) - before:
            # Ours and not waited for yet, so the number is still its own.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


class Deadline:
    """Paces a loop that looks for a condition until time is up."""

    def __init__(self, seconds: float, what: str) -> None:
        self._end = time.monotonic() + seconds
        self._what = what
        self._seconds = seconds

    def pause(self, interval: float = 0.02) -> None:
        """Waits before the next look; raises ChildFailed when time is up."""
        if time.monotonic() >= self._end:
            raise ChildFailed(f"{self._what} within {self._seconds:g} s")
        time.sleep(interval)
