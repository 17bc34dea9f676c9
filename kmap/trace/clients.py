# SPDX-License-Identifier: Apache-2.0
"""Who makes the request that is recorded, and how one knows that it is over."""

from __future__ import annotations

import contextlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from kmap.demo import syscalls
from kmap.demo.children import Child, Deadline
from kmap.demo.rig import Rig

# Of the file that the service serves.
PATH = "/body"
_ASLEEP_S = 10.0
_ASLEEP_LOOK_S = 0.005
_COMMAND_S = 60.0
# Waits for a line before it becomes the command, so that it is followed from its start.
_GATE = 'read -r _; exec "$@"'


def switches(pids: Iterable[int]) -> int | None:
    """Context switches of all threads so far; None while one of them runs."""
    total = 0
    for pid in pids:
        for task in syscalls.tasks([pid]):
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/task/{task}/status").read_text()
                for line in text.splitlines():
                    name, _, value = line.partition(":")
                    if name == "State" and value.split()[0] not in "SZ":
                        return None
                    if name.endswith("_ctxt_switches"):
                        total += int(value)
    return total


def asleep(pids: Sequence[int]) -> int:
    """Waits until every thread waits for something to do, and goes on doing so.

    The value is how often they had been switched to, which says later whether they
    still sleep.
    """
    deadline = Deadline(_ASLEEP_S, "the programs did not come to rest")
    before = None
    while (now := switches(pids)) is None or now != before:
        before = now
        deadline.pause(_ASLEEP_LOOK_S)
    return now


class Client(ABC):
    """Who makes the request."""

    @abstractmethod
    def prepare(self) -> None:
        """Comes to where the next request begins."""

    @abstractmethod
    def pids(self) -> list[int]:
        """Its processes."""

    @abstractmethod
    def request(self) -> None:
        """Makes one request and waits until it is answered."""


class OwnClient(Client):
    """The client of this package, on one connection for all requests."""

    def __init__(self, rig: Rig, body_bytes: int) -> None:
        self._body = str(body_bytes)
        self.child = Child(
            "client",
            [
                *(sys.executable, "-I", str(Path(__file__).with_name("client.py"))),
                *(str(rig.http_port), PATH),
            ],
            env=rig.env,
            log=rig.directory / "client.log",
            cpus=rig.cpus,
            take_output=True,
            take_input=True,
        )

    def prepare(self) -> None:
        """Is always there."""

    def pids(self) -> list[int]:
        return self.child.family()

    def request(self) -> None:
        self.child.tell("go")
        line = self.child.output.readline().decode().strip()
        if line != self._body:
            raise self.child.failure(f"was not answered: {line or 'it ended'}")


class Command(Client):
    """CMD, started again for each request."""

    def __init__(
        self,
        words: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        cpus: frozenset[int] | None,
    ) -> None:
        self._words = words
        self._env = env
        self._log = log
        self._cpus = cpus
        self.child: Child | None = None

    def prepare(self) -> None:
        self.close()
        self.child = Child(
            self._words[0],
            ["/bin/sh", "-c", _GATE, "kmap-trace", *self._words],
            env=self._env,
            log=self._log,
            cpus=self._cpus,
            take_input=True,
        )
        asleep([self.child.pid])

    def pids(self) -> list[int]:
        return [self.child.pid] if self.child is not None else []

    def request(self) -> None:
        assert self.child is not None
        self.child.tell("go")
        if not self.child.wait(_COMMAND_S):
            raise self.child.failure(f"did not end within {_COMMAND_S:g} s")
        if self.child.returncode:
            raise self.child.failure(f"ended with {self.child.returncode}")

    def close(self) -> None:
        """Ends CMD if it still runs."""
        if self.child is not None:
            self.child.close()
