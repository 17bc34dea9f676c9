# SPDX-License-Identifier: Apache-2.0
"""How much of a program's traffic went by ring, from its statistics memfds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kmap import native, procfs, wire

ExpectRing = Callable[..., None]


@dataclass(frozen=True)
class Rings:
    """Sums over live and closed connections, of one end of each."""

    upgrades: int = 0
    rx: int = 0
    tx: int = 0

    @property
    def bytes(self) -> int:
        """Both ways."""
        return self.rx + self.tx

    def __add__(self, other: Rings) -> Rings:
        return Rings(
            self.upgrades + other.upgrades, self.rx + other.rx, self.tx + other.tx
        )


@functools.cache
def _index(name: str) -> int:
    return [counter.name for counter in native.counters()].index(name)


def _sums(statistics: wire.Statistics) -> Rings:
    counters = statistics.counters
    return Rings(
        upgrades=counters[_index("upgrades")],
        rx=counters[_index("ring_rx_bytes")]
        + sum(row.ring_rx_bytes for row in statistics.rows),
        tx=counters[_index("ring_tx_bytes")]
        + sum(row.ring_tx_bytes for row in statistics.rows),
    )


class Watch:
    """Adds up what processes did, including those that ended since the last look."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], Rings] = {}

    def look(self, pids: Iterable[int]) -> Rings:
        """Looks at these processes; the sum over all that were ever looked at."""
        for pid in pids:
            for file in procfs.open_statistics(pid):
                statistics = procfs.read_statistics(file)
                if statistics is None:
                    continue
                now = _sums(statistics)
                last = self._seen.get(file.identity, Rings())
                # A row that is freed between reading counters and rows is in neither.
                self._seen[file.identity] = Rings(
                    max(now.upgrades, last.upgrades),
                    max(now.rx, last.rx),
                    max(now.tx, last.tx),
                )
        return sum(self._seen.values(), Rings())


def rings(pids: Iterable[int]) -> Rings:
    """What these processes did until now."""
    return Watch().look(pids)
