# SPDX-License-Identifier: Apache-2.0
"""CPU time of processes, in microseconds, and who else had the CPUs."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kmap.results import UsageError

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_SETTLE_S = 2.0
_SETTLE_STEP_S = 0.03
_SETTLED_US = 300.0


def used_us(pids: Iterable[int]) -> float:
    """User and system time of all threads of pids since they started.

    The scheduler's own count has nanoseconds where /proc/PID/stat has ticks; a
    thread that ends takes its share with it, and those measured here do not.
    """
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(OSError):
                    with open(f"/proc/{pid}/task/{task}/schedstat") as file:
                        total += int(file.read().split()[0])
    return total / 1000


def settle(pids: Iterable[int]) -> None:
    """Waits until pids have stopped working, so that what they used is complete.

    A program that is never idle is measured as it is.
    """
    watched = tuple(pids)
    before = used_us(watched)
    end = time.monotonic() + _SETTLE_S
    while time.monotonic() < end:
        time.sleep(_SETTLE_STEP_S)
        now = used_us(watched)
        if now - before < _SETTLED_US:
            return
        before = now


@dataclass(frozen=True)
class HostTime:
    """Ticks of some CPUs since boot, or between two looks."""

    busy: int
    steal: int
    total: int

    @classmethod
    def read(cls, cpus: Iterable[int]) -> HostTime:
        """The ticks now."""
        wanted = {f"cpu{cpu}" for cpu in cpus}
        busy = steal = total = 0
        with open("/proc/stat") as file:
            for line in file:
                name, *fields = line.split()
                if name in wanted:
                    # Guest time is part of user time already.
                    ticks = [int(field) for field in fields[:8]]
                    steal += ticks[7]
                    total += sum(ticks)
                    # Neither idle, nor waiting for a disk, nor somebody else's.
                    busy += sum(ticks) - ticks[3] - ticks[4] - ticks[7]
        return cls(busy, steal, total)

    def __sub__(self, before: HostTime) -> HostTime:
        return HostTime(
            self.busy - before.busy,
            self.steal - before.steal,
            self.total - before.total,
        )

    @property
    def steal_share(self) -> float:
        """The share of time that the hypervisor gave to others."""
        return self.steal / self.total if self.total else 0.0

    def foreign_share(self, own_s: float) -> float:
        """The share that went to other programs than those that used own_s seconds."""
        others = self.busy - own_s * _TICKS_PER_S
        return max(0.0, others) / self.total if self.total else 0.0


def parse_cpus(text: str | None) -> frozenset[int] | None:
    """CPUs from "0", "0,2-3" or "all"; None is no pinning, and the default is one."""
    allowed = os.sched_getaffinity(0)
    if text is None:
        # Interrupts tend to be served on the first.
        return frozenset({max(allowed)})
    if text == "all":
        return None
    chosen: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            raise UsageError(f"--cpus {text}: a list such as 0 or 0,2-3, or all")
        chosen.update(range(int(first), int(last or first) + 1))
    if not chosen or not chosen <= allowed:
        raise UsageError(
            f"--cpus {text}: this process may use "
            + ",".join(str(cpu) for cpu in sorted(allowed))
        )
    return frozenset(chosen)


@contextlib.contextmanager
def out_of_the_way(cpus: frozenset[int] | None) -> Iterator[None]:
    """Keeps this process off the measured CPUs, if there are others."""
    before = os.sched_getaffinity(0)
    others = before - (cpus or frozenset())
    if others:
        os.sched_setaffinity(0, others)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
