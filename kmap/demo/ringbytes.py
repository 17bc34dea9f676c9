# SPDX-License-Identifier: Apache-2.0
"""How many bytes the library says it carried by ring, process by process."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator

from kmap import native, procfs, wire


@functools.cache
def _closed_counters() -> tuple[int, int]:
    names = [counter.name for counter in native.counters()]
    return names.index("ring_rx_bytes"), names.index("ring_tx_bytes")


class Collector:
    """Keeps the statistics of processes readable beyond their end."""

    def __init__(self) -> None:
        self._fds: dict[tuple[int, int], int] = {}

    def look(self, pids: Iterable[int]) -> None:
        """Opens what has appeared in pids since the last look."""
        for pid in pids:
            for file in procfs.open_statistics(pid):
                if file.identity in self._fds:
                    continue
                fd = procfs.open_file(file)
                if fd is not None:
                    self._fds[file.identity] = fd

    def statistics(self) -> Iterator[wire.Statistics]:
        """What each of the processes has or had, as it is now."""
        for fd in self._fds.values():
            if wire.is_made(fd):
                yield wire.read_statistics(fd)

    def ring_bytes(self) -> int:
        """Bytes taken from rings and put into rings so far, open or closed."""
        total = 0
        received, sent = _closed_counters()
        for statistics in self.statistics():
            total += statistics.counters[received] + statistics.counters[sent]
            total += sum(
                row.ring_rx_bytes + row.ring_tx_bytes for row in statistics.rows
            )
        return total

    def close(self) -> None:
        """Lets go of the statistics."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
