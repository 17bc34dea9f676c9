# SPDX-License-Identifier: Apache-2.0
"""Signals to every thread of this process that moves bytes, again and again."""

from __future__ import annotations

import ctypes
import os
import signal
import threading

# One makes an interrupted call fail with EINTR, the other has it restarted.
_INTERRUPTS = signal.SIGUSR2
_RESTARTS = signal.SIGRTMIN + 5


def quiet_handlers() -> None:
    """Installs handlers that do nothing; for the main thread, at its start."""
    for number, interrupts in ((_INTERRUPTS, True), (_RESTARTS, False)):
        signal.signal(number, lambda signum, frame: None)
        signal.siginterrupt(number, interrupts)


class Storm:
    """The signals of one case; none with a period of 0."""

    def __init__(self, period_us: int, restart: bool) -> None:
        self.count = 0
        self._period = period_us / 1e6
        self._number = _RESTARTS if restart else _INTERRUPTS
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins."""
        if self._period:
            self._thread = threading.Thread(target=self._rage, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends; no signal comes afterwards."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _rage(self) -> None:
        # pthread_kill is undefined for a thread that has ended; this is not.
        tgkill = ctypes.CDLL(None, use_errno=True).tgkill
        pid = os.getpid()
        spared = {pid, threading.get_native_id()}
        while not self._over.wait(self._period):
            for name in os.listdir("/proc/self/task"):
                if int(name) not in spared:
                    self.count += tgkill(pid, int(name), int(self._number)) == 0
