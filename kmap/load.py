# SPDX-License-Identifier: Apache-2.0
"""What processes and connections do per second: two looks and what lies between."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kmap import procfs
from kmap.counters import counters
from kmap.procfs import Process
from kmap.snapshot import Connection, Group, Snapshot, look

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_BYTES = ("ring_rx_bytes", "ring_tx_bytes", "kernel_rx_bytes", "kernel_tx_bytes")
_WAKEUPS = ("doorbells_rung", "futex_wakes")


class Rates(NamedTuple):
    """Bytes per second; None in the first look, and where nobody knows."""

    ring_rx: float | None = None
    ring_tx: float | None = None
    kernel_rx: float | None = None
    kernel_tx: float | None = None

    @property
    def ring(self) -> float:
        """Both ways; what is not known is nothing."""
        return (self.ring_rx or 0.0) + (self.ring_tx or 0.0)

    @property
    def kernel(self) -> float:
        """Both ways; what is not known is nothing."""
        return (self.kernel_rx or 0.0) + (self.kernel_tx or 0.0)


class ConnectionLoad(NamedTuple):
    """One end of a connection and what it carries."""

    connection: Connection
    rates: Rates


@dataclass(frozen=True)
class ProcessLoad:
    """A process, or all that share their counters since a fork."""

    pid: int
    comm: str
    # All of them, pid first.
    pids: tuple[int, ...]
    # Of one CPU, in percent; None in the first look.
    cpu_percent: float | None
    rates: Rates
    # Doorbells and futexes by which it woke others, per second; None in the first look.
    wakeups: float | None
    # Open connections by state.
    ring: int
    pending: int
    kernel: int
    # The most frequent one of those that are on the kernel; empty if there is none.
    reason: str


@dataclass(frozen=True)
class Load:
    """What happened between two looks."""

    # Between the looks; 0 in the first.
    seconds: float
    processes: tuple[ProcessLoad, ...]
    connections: tuple[ConnectionLoad, ...]
    hidden: int
    notes: tuple[str, ...]


def _cpu_s(pid: int) -> float:
    return procfs.cpu_ticks(pid) * _TICK_S


@dataclass(frozen=True)
class _Past:
    at: float
    # By inode of the socket: the four counts.
    sockets: dict[int, tuple[int | None, ...]]
    # By statistics memfd.
    counters: dict[tuple[int, int], dict[str, int]]
    # By pid, seconds.
    cpu: dict[int, float]


class Meter:
    """Looks again and again."""

    def __init__(self) -> None:
        self._past: _Past | None = None

    def sample(self) -> Load:
        """Looks, and compares with the last look.

        What has appeared since then has moved all its bytes since then; what a
        connection moved before its end is in its process's ring bytes, and not in its
        kernel bytes.
        """
        seen = look(include_kernel=True)
        past = self._past
        now = _Past(
            time.monotonic(),
            {
                inode: tuple(getattr(each, name) for name in _BYTES)
                for each, inode in zip(seen.connections, seen.inodes, strict=True)
            },
            {group.file.identity: counters(group).counters for group in seen.groups},
            {process.pid: _cpu_s(process.pid) for process in seen.processes},
        )
        self._past = now
        seconds = now.at - past.at if past is not None else 0.0
        connections = tuple(
            ConnectionLoad(each, _rates(now.sockets[inode], inode, past, seconds))
            for each, inode in zip(seen.connections, seen.inodes, strict=True)
        )
        return Load(
            seconds,
            tuple(_processes(seen, connections, now, past, seconds)),
            connections,
            seen.hidden,
            seen.notes,
        )


def _rates(
    counts: tuple[int | None, ...], inode: int, past: _Past | None, seconds: float
) -> Rates:
    if past is None or seconds <= 0:
        return Rates()
    before = past.sockets.get(inode, (0,) * len(_BYTES))
    # The count of a connection that becomes known by its upgrade starts somewhere.
    return Rates(
        *(
            None if newer is None or older is None else max(0, newer - older) / seconds
            for newer, older in zip(counts, before, strict=True)
        )
    )


def _units(seen: Snapshot) -> list[tuple[tuple[Process, ...], Group | None]]:
    """Groups, and the processes that share counters with nobody, as they have none."""
    found: list[tuple[tuple[Process, ...], Group | None]] = []
    grouped: set[int] = set()
    for group in seen.groups:
        holders = tuple(each for each in group.holders if each.pid not in grouped)
        if holders:
            found.append((holders, group))
            grouped.update(each.pid for each in holders)
    found.extend(((each,), None) for each in seen.processes if each.pid not in grouped)
    return found


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _processes(
    seen: Snapshot,
    connections: Sequence[ConnectionLoad],
    now: _Past,
    past: _Past | None,
    seconds: float,
) -> list[ProcessLoad]:
    of_pid: dict[int, list[ConnectionLoad]] = {}
    for each in connections:
        of_pid.setdefault(each.connection.pid, []).append(each)
    found = []
    for holders, group in _units(seen):
        mine = [each for holder in holders for each in of_pid.get(holder.pid, ())]
        states = Counter(each.connection.state for each in mine)
        reasons = Counter(
            each.connection.reason for each in mine if each.connection.reason
        )
        first = holders[0]
        cpu = wakeups = None
        rates = Rates()
        if past is not None and seconds > 0:
            # One that has just come has used its CPU time at any time.
            cpu = 100 * sum(
                max(0.0, now.cpu[p.pid] - past.cpu.get(p.pid, now.cpu[p.pid]))
                for p in holders
            )
            cpu /= seconds
            moved = _moved(group, now, past)
            wakeups = sum(moved[name] for name in _WAKEUPS) / seconds
            rates = Rates(
                moved["ring_rx_bytes"] / seconds,
                moved["ring_tx_bytes"] / seconds,
                _sum([each.rates.kernel_rx for each in mine]),
                _sum([each.rates.kernel_tx for each in mine]),
            )
        found.append(
            ProcessLoad(
                pid=first.pid,
                comm=first.comm,
                pids=tuple(each.pid for each in holders),
                cpu_percent=cpu,
                rates=rates,
                wakeups=wakeups,
                ring=states["ring"],
                pending=states["pending"],
                kernel=states["kernel"],
                reason=reasons.most_common(1)[0][0] if reasons else "",
            )
        )
    return found


def _moved(group: Group | None, now: _Past, past: _Past) -> Counter[str]:
    """How much each counter has grown."""
    if group is None:
        return Counter()
    newer = now.counters[group.file.identity]
    older = past.counters.get(group.file.identity, {})
    return Counter(
        {name: max(0, value - older.get(name, 0)) for name, value in newer.items()}
    )
