# SPDX-License-Identifier: Apache-2.0
"""What a hang is examined by: where every thread of a process is, in every layer."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import signal
import subprocess

_GDB_S = 20.0


def dump_on_request() -> None:
    """Makes SIGUSR1 write the Python stack of every thread to standard error."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)


def threads(pid: int) -> list[str]:
    """The system call and the kernel's stack of every thread, as far as allowed."""
    lines = []
    with contextlib.suppress(OSError):
        for task in sorted(os.listdir(f"/proc/{pid}/task"), key=int):
            parts = [f"{pid}/{task}"]
            for name in ("comm", "wchan", "syscall", "stack"):
                with contextlib.suppress(OSError):
                    with open(f"/proc/{pid}/task/{task}/{name}") as file:
                        text = " < ".join(file.read().strip().splitlines())
                        parts.append(f"{name}={text}")
            lines.append(" ".join(parts))
    return lines


def native_stacks(pid: int) -> str:
    """The C stack of every thread, by gdb if it is installed."""
    gdb = shutil.which("gdb")
    if gdb is None:
        return "(gdb is not installed)"
    try:
        done = subprocess.run(
            [gdb, "-p", str(pid), "-batch", "-nx", "-ex", "thread apply all bt 24"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_GDB_S,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return f"(gdb did not answer within {_GDB_S:g} s)"
    return "\n".join(
        line for line in done.stdout.splitlines() if line.startswith(("Thread ", "#"))
    )
