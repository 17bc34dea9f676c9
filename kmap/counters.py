# SPDX-License-Identifier: Apache-2.0
"""The counters of a process by name, with those of its open connections."""

from __future__ import annotations

from dataclasses import dataclass

from kmap import native
from kmap.snapshot import Group

_BYTES = ("ring_rx_bytes", "ring_tx_bytes", "kernel_rx_bytes", "kernel_tx_bytes")


@dataclass(frozen=True)
class ProcessCounters:
    """The counters of one statistics memfd, which forked processes share."""

    pid: int
    comm: str
    # All processes that hold the memfd, pid among them.
    pids: tuple[int, ...]
    # By name; byte counts include connections that are still open.
    counters: dict[str, int]
    # How often each reason kept a connection on the kernel; zeros left out.
    reasons: dict[str, int]
    # Connections now, by state.
    connections: dict[str, int]


def counter_meanings() -> dict[str, str]:
    """What each name of counters() counts."""
    found = {counter.name: counter.meaning for counter in native.counters()}
    # The table of counters speaks of closed connections only; see counters().
    return found | {
        name: found[name].partition(" of closed")[0].partition(" by closed")[0]
        for name in _BYTES
    }


def counters(group: Group) -> ProcessCounters:
    """The counters of one memfd by name, with those of open connections."""
    statistics = group.statistics
    values = {
        counter.name: value
        for counter, value in zip(native.counters(), statistics.counters, strict=False)
    }
    connections: dict[str, int] = {}
    for row in statistics.rows:
        state = row.state.name.lower()
        connections[state] = connections.get(state, 0) + 1
        for name in _BYTES:
            values[name] = values.get(name, 0) + getattr(row, name)
    first = group.holders[0]
    return ProcessCounters(
        pid=first.pid,
        comm=first.comm,
        pids=tuple(holder.pid for holder in group.holders),
        counters=values,
        reasons={
            reason.name: value
            for reason, value in zip(native.reasons(), statistics.reasons, strict=False)
            if reason.name and value
        },
        connections=connections,
    )
