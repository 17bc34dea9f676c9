# SPDX-License-Identifier: Apache-2.0
"""What is done to workers from outside: stopping them, and a busy neighbour."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from types import TracebackType

# It ends by itself when the session is gone.
_SPIN = "import os\nwhile os.getppid() == {}:\n    for _ in range(100000): pass"


def stop_for(pid: int, seconds: float) -> bool:
    """Stops a child of this process for a while; whether it was alive to be stopped."""
    os.kill(pid, signal.SIGSTOP)
    try:
        # The signal takes effect when the process next looks at it.
        flags = os.WSTOPPED | os.WEXITED | os.WNOWAIT
        state = os.waitid(os.P_PID, pid, flags)
        if state is None or state.si_code != os.CLD_STOPPED:
            return False
        # Takes the news of the stop, but never that of an end: Popen wants that.
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG)
        time.sleep(seconds)
        return True
    finally:
        os.kill(pid, signal.SIGCONT)


class Hog:
    """A program that never sleeps, on a CPU to which the workers are bound, too."""

    def __init__(self, pids: Iterable[int], rng: random.Random) -> None:
        self._before = {pid: os.sched_getaffinity(pid) for pid in pids}
        cpu = {rng.choice(sorted(os.sched_getaffinity(0)))}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _SPIN.format(os.getpid())],
            stdin=subprocess.DEVNULL,
        )
        for pid in (*self._before, self._process.pid):
            # The threads of the case inherit it from the one that makes them.
            os.sched_setaffinity(pid, cpu)

    def __enter__(self) -> Hog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        for pid, cpus in self._before.items():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(pid, cpus)
