# SPDX-License-Identifier: Apache-2.0
"""What long-lived processes hold at one moment."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kmap import native, procfs

# What is judged, in the order in which it is shown.
METRICS = ("pss_kb", "shmem_kb", "fds", "threads", "mappings")
_ROLLUP = re.compile(r"^(Pss|Pss_Shmem): +(\d+) kB", re.MULTILINE)
_THREADS = re.compile(r"^Threads:\t(\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Held:
    """Sums over the processes of one group."""

    processes: int = 0
    # Memory, each page's share, and of that what is shared memory.
    pss_kb: int = 0
    shmem_kb: int = 0
    # Descriptors of anything but files, of which databases keep some open.
    fds: int = 0
    threads: int = 0
    mappings: int = 0
    # Connections with a row: on a ring, or on the way there or back.
    rows: int = 0
    # Of processes that are there now: they go down when one ends.
    upgrades: int = 0
    resets: int = 0

    def __add__(self, other: Held) -> Held:
        names = self.__dataclass_fields__
        return Held(**{n: getattr(self, n) + getattr(other, n) for n in names})


@dataclass(frozen=True)
class Sample:
    """One look at everything."""

    # Seconds since the start of the soak.
    at: float
    groups: Mapping[str, Held]
    # Rendezvous names in the network namespace.
    names: int


@functools.cache
def _counter(name: str) -> int:
    return [counter.name for counter in native.counters()].index(name)


def _text(path: str) -> str:
    with open(path, encoding="ascii", errors="replace") as file:
        return file.read()


def _descriptors(pid: int) -> int:
    count = 0
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            link = os.readlink(f"/proc/{pid}/fd/{name}")
            count += not link.startswith("/") or link.startswith("/memfd:")
    return count


def held(pid: int) -> Held | None:
    """What one process holds; None when it is gone."""
    try:
        memory = dict(_ROLLUP.findall(_text(f"/proc/{pid}/smaps_rollup")))
        threads = _THREADS.search(_text(f"/proc/{pid}/status"))
        fds = _descriptors(pid)
        mappings = _text(f"/proc/{pid}/maps").count("\n")
    except (FileNotFoundError, ProcessLookupError):
        return None
    rows = upgrades = resets = 0
    for file in procfs.open_statistics(pid):
        seen = procfs.read_statistics(file)
        # A forked child has its parent's open, too.
        if seen is not None and seen.pid == pid:
            rows += len(seen.rows)
            upgrades += seen.counters[_counter("upgrades")]
            resets += seen.counters[_counter("protocol_resets")]
    return Held(
        processes=1,
        pss_kb=int(memory.get("Pss", 0)),
        shmem_kb=int(memory.get("Pss_Shmem", 0)),
        fds=fds,
        threads=int(threads[1]) if threads else 0,
        mappings=mappings,
        rows=rows,
        upgrades=upgrades,
        resets=resets,
    )


def group(pids: Iterable[int]) -> Held:
    """The sum over the processes that are still there."""
    return sum((one for pid in pids if (one := held(pid))), Held())


def names() -> int:
    """Rendezvous names that are bound in this network namespace."""
    return sum(" @kmap1" in line for line in _text("/proc/net/unix").splitlines())


def look(at: float, groups: Mapping[str, Iterable[int]]) -> Sample:
    """Looks at all groups."""
    return Sample(at, {name: group(pids) for name, pids in groups.items()}, names())
