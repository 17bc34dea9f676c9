# SPDX-License-Identifier: Apache-2.0
"""Runs the loads side by side, and looks at the servers meanwhile."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from kmap.demo.children import ChildFailed, Deadline
from tests.soak import samples
from tests.soak.judge import RETURN
from tests.soak.loads import Load
from tests.soak.samples import Held, Sample

# Servers are at rest when nothing has changed for this long (Envoy keeps connections
# for three seconds), and have ten times as long to come to it.
_REST_S = 6.0
_TICK_S = 0.5


def say(text: str) -> None:
    """Tells who watches."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class Seen:
    """What was seen of the servers."""

    base: Mapping[str, Held] = field(default_factory=dict)
    final: Mapping[str, Held] = field(default_factory=dict)
    series: list[Sample] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    names_left: int = 0


class Runner:
    """One soak."""

    def __init__(
        self, loads: Sequence[Load], round_s: int, rest_s: float = _REST_S
    ) -> None:
        self._loads = loads
        self._round_s = round_s
        self._rest_s = rest_s
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.seen = Seen()

    def _groups(self) -> dict[str, list[int]]:
        return {n: pids for load in self._loads for n, pids in load.groups().items()}

    def _work(self, load: Load, more: Callable[[int], bool]) -> None:
        number = 0
        try:
            while more(number) and not self._stop.is_set():
                load.round(self._round_s)
                number += 1
        except BaseException as error:
            with self._lock:
                text = f"{load.name}: {type(error).__name__}: {error}"
                self.seen.errors.append(text)
                say(text)
            self._stop.set()

    @contextlib.contextmanager
    def _working(self, more: Callable[[Load, int], bool]):  # type: ignore[no-untyped-def]
        threads = [
            threading.Thread(
                target=self._work, args=(load, lambda n, load=load: more(load, n))
            )
            for load in self._loads
        ]
        for thread in threads:
            thread.start()
        try:
            yield threads
        finally:
            for thread in threads:
                thread.join()

    def _quiet(self, like: Mapping[str, Held] | None) -> Sample:
        """A look once the servers have noticed that nobody is there any more."""
        deadline = Deadline(10 * self._rest_s, "the servers did not come to rest")
        last: Mapping[str, tuple[int, int]] = {}
        since = time.monotonic()
        while True:
            sample = samples.look(0, self._groups())
            now = {name: (held.fds, held.rows) for name, held in sample.groups.items()}
            if now != last:
                last, since = now, time.monotonic()
            back = like is None or all(
                held.fds <= like[name].fds + RETURN["fds"].of(like[name].fds)
                for name, held in sample.groups.items()
            )
            if back and time.monotonic() - since >= self._rest_s:
                return sample
            try:
                deadline.pause(_TICK_S)
            except ChildFailed:
                # The judge says what is left.
                return sample

    def run(self, seconds: float, interval: float) -> Seen:
        """A first round of everything, then rounds for so many seconds."""
        for load in self._loads:
            say(f"starting {load.name}")
            load.start()
        with self._working(lambda load, number: number < load.first_rounds):
            pass
        self.seen.base = self._quiet(None).groups
        if self._stop.is_set():
            self.seen.final = self.seen.base
            return self.seen
        start = time.monotonic()
        say(f"under load for {seconds / 60:.3g} minutes")
        with self._working(lambda load, number: time.monotonic() - start < seconds):
            while time.monotonic() - start < seconds and not self._stop.is_set():
                at = time.monotonic() - start
                sample = samples.look(at, self._groups())
                self.seen.series.append(sample)
                self._tell(sample)
                self._stop.wait(max(0.0, interval - (time.monotonic() - start - at)))
        final = self._quiet(self.seen.base)
        self.seen.final = final.groups
        self.seen.names_left = final.names
        return self.seen

    def _tell(self, sample: Sample) -> None:
        if len(self.seen.series) % 12 == 1:
            held = ", ".join(
                f"{name} {held.pss_kb >> 10} MiB {held.fds} fds"
                for name, held in sample.groups.items()
            )
            say(f"{sample.at / 60:5.1f} min: {held}")

    def finish(self) -> None:
        """Ends the servers as they want to be ended."""
        for load in self._loads:
            try:
                load.finish()
            except Exception as error:
                self.seen.errors.append(f"{load.name}: {error}")


def totals(loads: Sequence[Load]) -> dict[str, int]:
    """What all loads did."""
    done: Counter[str] = Counter()
    for load in loads:
        done.update(load.done)
    return dict(done)
