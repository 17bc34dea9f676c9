# SPDX-License-Identifier: Apache-2.0
"""What ``kmap exporter`` tells Prometheus; docs/metrics.md lists it for users.

Counters do not go back when processes end: each statistics memfd is kept open from
the first scrape that finds it until its last holder has gone, and is then read for the
last time.  What a process counts that starts and ends between two scrapes is not seen.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from kmap import __version__, procfs, wire
from kmap.counters import ProcessCounters, counter_meanings, counters
from kmap.render import printable
from kmap.snapshot import Group, Snapshot, look

# Names of programs beyond so many are counted together, as OTHER.
MOST_PROGRAMS = 200
OTHER = "other programs"

COUNTER, GAUGE = "counter", "gauge"


@dataclass(frozen=True)
class Metric:
    """One metric as docs/metrics.md has it; labels without pid."""

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str


_FALLBACKS = Metric(
    "kmap_fallbacks_total",
    COUNTER,
    ("comm", "reason"),
    "Times that a connection was kept on the kernel or taken back to it",
)
_SOCKET_RX = Metric(
    "kmap_socket_rx_bytes_total",
    COUNTER,
    ("comm",),
    "Bytes that TCP connections took from the kernel, upgraded or not, as seen at "
    "scrapes",
)
_SOCKET_TX = Metric(
    "kmap_socket_tx_bytes_total",
    COUNTER,
    ("comm",),
    "Bytes that TCP connections gave to the kernel, upgraded or not, as seen at "
    "scrapes",
)
_CONNECTIONS = Metric(
    "kmap_connections",
    GAUGE,
    ("comm", "state", "reason"),
    "Ends of TCP connections that are open in processes with the library",
)
_PROCESSES = Metric(
    "kmap_processes", GAUGE, ("comm",), "Processes that have the library"
)
_HIDDEN = Metric(
    "kmap_hidden_processes", GAUGE, (), "Processes that the exporter may not look at"
)
_UNREADABLE = Metric(
    "kmap_unreadable_statistics",
    GAUGE,
    (),
    "Processes whose statistics are of another version of the library",
)
_DURATION = Metric("kmap_scrape_seconds", GAUGE, (), "Time that this scrape took")
_BUILD = Metric(
    "kmap_build_info", GAUGE, ("version",), "Always 1, with the exporter's version"
)


def _counter_metric(name: str, meaning: str) -> Metric:
    return Metric(
        f"kmap_{name}_total", COUNTER, ("comm",), meaning[:1].upper() + meaning[1:]
    )


def metrics() -> tuple[Metric, ...]:
    """All that a scrape answers, in its order."""
    return (
        *(_counter_metric(*each) for each in counter_meanings().items()),
        *(_FALLBACKS, _SOCKET_RX, _SOCKET_TX, _CONNECTIONS, _PROCESSES),
        *(_HIDDEN, _UNREADABLE, _DURATION, _BUILD),
    )


# A label of a program, and of a process where those are told apart: comm and pid.
Who = tuple[str, str]


@dataclass
class _Counts:
    """Counters and reasons by name; only ever more."""

    counters: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def raise_to(self, now: ProcessCounters) -> None:
        """A count that is read while it moves from a row to a total may be short."""
        self.counters |= Counter(now.counters)
        self.reasons |= Counter(now.reasons)

    def add(self, other: _Counts) -> None:
        self.counters.update(other.counters)
        self.reasons.update(other.reasons)


@dataclass
class _Held:
    """A statistics memfd that is kept open."""

    fd: int
    group: Group
    who: Who
    counts: _Counts = field(default_factory=_Counts)


class KmapCollector(Collector):
    """Looks at the host at each scrape; may be called from several threads."""

    def __init__(self, *, per_process: bool = False) -> None:
        self._per_process = per_process
        self._lock = threading.Lock()
        self._held: dict[tuple[int, int], _Held] = {}
        # What processes that have ended had counted.
        self._ended: dict[Who, _Counts] = {}
        self._programs: set[str] = set()
        # By inode of the socket: the last counts of the kernel, rx and tx.
        self._sockets: dict[int, tuple[int, int]] = {}
        self._socket_bytes: dict[Who, list[int]] = {}

    def describe(self) -> Iterable[Family]:
        """Names only: registering it must not look at the host."""
        return [self._family(each) for each in metrics()]

    def collect(self) -> Iterable[Family]:
        """One scrape."""
        with self._lock:
            began = time.monotonic()
            seen = look(include_kernel=True)
            self._read(seen)
            self._note_sockets(seen)
            families = list(self._families(seen))
            duration = self._family(_DURATION)
            duration.add_metric([], time.monotonic() - began)
            return [*families, duration]

    def close(self) -> None:
        """Lets go of all memfds."""
        with self._lock:
            for held in self._held.values():
                os.close(held.fd)
            self._held.clear()

    def _program(self, comm: str) -> str:
        comm = printable(comm)
        if comm not in self._programs:
            if len(self._programs) >= MOST_PROGRAMS:
                return OTHER
            self._programs.add(comm)
        return comm

    def _who(self, comm: str, pid: int) -> Who:
        return self._program(comm), str(pid) if self._per_process else ""

    def _hold(self, group: Group) -> None:
        fd = procfs.open_file(group.file)
        if fd is None:
            return
        first = group.holders[0]
        self._held[group.file.identity] = _Held(
            fd, group, self._who(first.comm, first.pid)
        )

    def _read(self, seen: Snapshot) -> None:
        found = {group.file.identity: group for group in seen.groups}
        for identity, group in found.items():
            if identity not in self._held:
                self._hold(group)
        for identity, held in list(self._held.items()):
            if identity in found:
                held.group = found[identity]
                held.counts.raise_to(counters(held.group))
                continue
            # Nobody was seen with it, which may have been a moment only.
            ended = not _is_held(held.group)
            with contextlib.suppress(wire.NotStatistics, OSError):
                last = wire.read_statistics(held.fd)
                held.counts.raise_to(
                    counters(Group(held.group.file, held.group.holders, last))
                )
            if ended:
                os.close(held.fd)
                del self._held[identity]
                who = (held.who[0], "")
                self._ended.setdefault(who, _Counts()).add(held.counts)

    def _note_sockets(self, seen: Snapshot) -> None:
        now: dict[int, tuple[int, int]] = {}
        for each, inode in zip(seen.connections, seen.inodes, strict=True):
            if each.kernel_rx_bytes is None or each.kernel_tx_bytes is None:
                continue
            now[inode] = counts = (each.kernel_rx_bytes, each.kernel_tx_bytes)
            total = self._socket_bytes.setdefault(
                (self._program(each.comm), ""), [0, 0]
            )
            before = self._sockets.get(inode, (0, 0))
            for way in (0, 1):
                total[way] += max(0, counts[way] - before[way])
        self._sockets = now

    def _family(self, metric: Metric) -> CounterMetricFamily | GaugeMetricFamily:
        labels = list(metric.labels)
        if self._per_process and _has_pid(metric):
            labels.insert(1, "pid")
        if metric.kind == COUNTER:
            return CounterMetricFamily(metric.name, metric.help, labels=labels)
        return GaugeMetricFamily(metric.name, metric.help, labels=labels)

    def _labels(self, who: Who) -> list[str]:
        return list(who) if self._per_process else [who[0]]

    def _families(self, seen: Snapshot) -> Iterator[Family]:
        totals: dict[Who, _Counts] = {}
        for who, counts in self._ended.items():
            totals.setdefault(who, _Counts()).add(counts)
        for held in self._held.values():
            totals.setdefault(held.who, _Counts()).add(held.counts)
        for name, meaning in counter_meanings().items():
            family = self._family(_counter_metric(name, meaning))
            for who, counts in totals.items():
                family.add_metric(self._labels(who), counts.counters[name])
            yield family
        family = self._family(_FALLBACKS)
        for who, counts in totals.items():
            comm, *pid = self._labels(who)
            for reason, count in counts.reasons.items():
                family.add_metric([comm, *pid, reason], count)
        yield family
        for way, metric in enumerate((_SOCKET_RX, _SOCKET_TX)):
            family = self._family(metric)
            for who, both in self._socket_bytes.items():
                family.add_metric([who[0]], both[way])
            yield family
        yield from self._gauges(seen)

    def _gauges(self, seen: Snapshot) -> Iterator[Family]:
        connections = Counter(
            (self._who(each.comm, each.pid), each.state, each.reason)
            for each in seen.connections
        )
        family = self._family(_CONNECTIONS)
        for (who, state, reason), count in connections.items():
            family.add_metric([*self._labels(who), state, reason], count)
        yield family
        family = self._family(_PROCESSES)
        processes = Counter(self._program(each.comm) for each in seen.processes)
        for comm, count in processes.items():
            family.add_metric([comm], count)
        yield family
        for metric, value in (
            (_HIDDEN, seen.hidden),
            (_UNREADABLE, len(seen.notes)),
        ):
            family = self._family(metric)
            family.add_metric([], value)
            yield family
        family = self._family(_BUILD)
        family.add_metric([__version__], 1)
        yield family


def _has_pid(metric: Metric) -> bool:
    """Whether --per-process tells processes apart in it."""
    return "comm" in metric.labels and metric not in (
        _SOCKET_RX,
        _SOCKET_TX,
        _PROCESSES,
    )


def _is_held(group: Group) -> bool:
    return any(
        group.file.identity in {f.identity for f in procfs.open_statistics(holder.pid)}
        for holder in group.holders
    )
