# SPDX-License-Identifier: Apache-2.0
"""Two processes with many connections between them, and what they cost."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kmap import procfs
from kmap.wire import RowState

Spawn = Callable[..., "subprocess.Popen[str]"]
PROGRAM = Path(__file__).parent / "programs" / "crowd.py"
# Beside one for each connection.
SPARE_DESCRIPTORS = 100
# After the last answer a process is asleep within this time.
SETTLE_S = 10.0
# Round trips until both ends of a connection are on the ring.
TURNS = 5


@dataclass(frozen=True)
class Activity:
    """What a process has done, all its threads together."""

    ticks: int
    switches: int


def activity(pid: int) -> Activity:
    """What it has done so far."""
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    switches = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        found = re.findall(r"ctxt_switches:\s+(\d+)", (task / "status").read_text())
        switches += sum(map(int, found))
    return Activity(int(stat[11]) + int(stat[12]), switches)


def memory(pid: int) -> dict[str, int]:
    """Bytes, by the names of smaps_rollup."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return {
        name: int(size) * 1024 for name, size in re.findall(r"(\w+):\s+(\d+) kB", text)
    }


def segment_bytes(pid: int) -> int:
    """Of the segments, the memory that has been touched."""
    total, inside = 0, False
    with open(f"/proc/{pid}/smaps") as maps:
        for line in maps:
            if line[0] in "0123456789abcdef":
                inside = "kmap-segment" in line
            elif inside and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
    return total


def states(pid: int) -> Counter[str]:
    """How many connections the process has in which state."""
    found: Counter[str] = Counter()
    for file in procfs.open_statistics(pid):
        statistics = procfs.read_statistics(file)
        if statistics is not None:
            found.update(RowState(row.state).name.lower() for row in statistics.rows)
    return found


def soft_limit(count: int) -> int:
    """For so many connections; there is place above it."""
    now, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 2 * SPARE_DESCRIPTORS
    if hard < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (now, needed))
    return count + SPARE_DESCRIPTORS


@dataclass(frozen=True)
class Crowd:
    """Both processes, all of their connections used."""

    server: subprocess.Popen[str]
    client: subprocess.Popen[str]
    # Wall time and CPU time of both, of the first round trips and of one more.
    first: tuple[float, float]
    more: tuple[float, float]

    @property
    def pids(self) -> tuple[int, int]:
        return self.client.pid, self.server.pid

    def turn(self, times: int) -> None:
        """So many round trips on one connection after the other."""
        assert self.client.stdin is not None
        assert self.client.stdout is not None
        self.client.stdin.write(f"{times}\n")
        self.client.stdin.flush()
        assert self.client.stdout.readline() == "done\n"

    def finish(self) -> tuple[int, int]:
        """The exit codes of both."""
        assert self.client.stdin is not None
        self.client.stdin.close()
        return self.client.wait(), self.server.wait()

    def idle(self, seconds: float) -> Activity:
        """What both do when nobody asks them for anything."""
        deadline = time.monotonic() + SETTLE_S
        before = [activity(pid) for pid in self.pids]
        # Each has yet to fall asleep after its last answer.
        while True:
            time.sleep(SETTLE_S / 100)
            now = [activity(pid) for pid in self.pids]
            if now == before or time.monotonic() > deadline:
                break
            before = now
        time.sleep(seconds)
        after = [activity(pid) for pid in self.pids]
        return Activity(
            sum(b.ticks - a.ticks for a, b in zip(before, after, strict=True)),
            sum(b.switches - a.switches for a, b in zip(before, after, strict=True)),
        )


def _ticks(pids: tuple[int, int]) -> int:
    return sum(activity(pid).ticks for pid in pids)


def gather(spawn: Spawn, env: Mapping[str, str], count: int) -> Crowd:
    """Makes the connections and uses each of them."""
    soft = str(soft_limit(count))
    command = [sys.executable, "-W", "error", str(PROGRAM)]
    server = spawn([*command, "server", soft], env=env, stdout=subprocess.PIPE)
    assert server.stdout is not None
    port = server.stdout.readline().strip()
    client = spawn(
        [*command, "client", soft, port, str(count)],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert client.stdout is not None
    assert client.stdout.readline() == "connected\n"
    crowd = Crowd(server, client, (0, 0), (0, 0))
    times = []
    for turns in (TURNS, 1):
        began, cpu = time.monotonic(), _ticks(crowd.pids)
        crowd.turn(turns)
        times.append((time.monotonic() - began, (_ticks(crowd.pids) - cpu) / 100))
    return Crowd(server, client, *times)


# Standard streams, a listener, an epoll set and the like.
OWN_DESCRIPTORS = 16


def descriptors(pid: int) -> list[int]:
    """The numbers that the process has open."""
    return sorted(int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir())
