# SPDX-License-Identifier: Apache-2.0
"""Every byte of a capture is the byte that was sent there, however fast it went."""

from __future__ import annotations

import errno
import os
import signal
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest

from kmap import procfs
from kmap.tap.follow import Direction
from kmap.tap.memory import geometry
from kmap.tap.table import Tables
from tests.tap.programs.numbers import numbers
from tests.tap.tapping import (
    NOBODY,
    As,
    Spawn,
    Talker,
    assert_packets,
    fields,
    needs,
    someone,
    start_tap,
    talker,
)


class Pair:
    """Two ends of one connection."""

    def __init__(
        self,
        spawn: Spawn,
        who: As,
        env: dict[str, str],
        client: As | None = None,
    ) -> None:
        self.server = talker(spawn, who, env, "numbers", "serve")
        self.port = int(self.server.answer())
        self.client = talker(spawn, client or who, env, "numbers", "connect", self.port)
        self.sent = {self.server: 0, self.client: 0}

    def stream(self, size: int, *, seed: int, piece: int = 20_000) -> None:
        """Each end sends so much, which the other reads."""
        self.one_way(self.client, self.server, size, seed, piece)
        self.one_way(self.server, self.client, size, seed + 1, piece)

    def one_way(
        self, source: Talker, target: Talker, size: int, seed: int, piece: int
    ) -> None:
        self.sent[source] += size
        target.tell(f"read {self.sent[source]}")
        source.tell(f"send {size} {seed} {piece}")
        assert int(source.answer()) == int(target.answer()) == self.sent[source]

    def upgrade(self) -> None:
        """A few round trips."""
        for number in range(8):
            self.stream(10, seed=number)

    def close(self) -> None:
        for end in (self.client, self.server):
            assert end.ask("close") == "closed"
            end.end()


def captured(file: Path, display: str) -> dict[int, list[tuple[int, bytes]]]:
    """By source port, the pieces of its stream: position and bytes."""
    found: dict[int, list[tuple[int, bytes]]] = defaultdict(list)
    names = ["tcp.srcport", "tcp.seq_raw", "tcp.payload"]
    for port, sequence, payload in fields(file, display, names):
        found[int(port)].append((int(sequence) - 1, bytes.fromhex(payload)))
    return found


def check(file: Path, display: str = "tcp.len > 0") -> int:
    """No byte is wrong or there twice; how many there are."""
    count = 0
    for pieces in captured(file, display).values():
        last = 0
        for position, data in pieces:
            assert position >= last
            assert data == numbers(position, len(data)), f"wrong bytes at {position}"
            last = position + len(data)
            count += len(data)
    return count


@pytest.mark.parametrize("name", ["root", "owner"])
@pytest.mark.parametrize("piece", [100, 20_000, 200_000])
def test_no_byte_is_wrong(
    spawn: Spawn,
    kernel_env: dict[str, str],
    kmap_env: dict[str, str],
    tmp_path: Path,
    name: str,
    piece: int,
) -> None:
    needs("tshark", "tshark")
    who = someone(name)
    pair = Pair(spawn, who, kmap_env)
    pair.upgrade()
    file = tmp_path / "stream.pcapng"
    tap = start_tap(spawn, who, kernel_env, file, "--port", pair.port)
    size = 100 * piece if piece < 1000 else 8_000_000
    for seed in range(3):
        pair.stream(size, seed=seed, piece=piece)
    # Whatever is lost before it, what has a rest behind it is there.
    pair.stream(100, seed=9)
    pair.close()
    summary = tap.finish()
    assert check(file) == summary["bytes"]
    assert summary["bytes"] + summary["lost_bytes"] == 6 * size + 200
    assert_packets(file)


@pytest.mark.parametrize("name", ["root", "owner"])
def test_the_last_bytes_come_before_the_end(
    spawn: Spawn,
    kernel_env: dict[str, str],
    kmap_env: dict[str, str],
    tmp_path: Path,
    name: str,
) -> None:
    needs("tshark", "tshark")
    who = someone(name)
    pairs = [Pair(spawn, who, kmap_env) for _ in range(8)]
    for pair in pairs:
        pair.upgrade()
    file = tmp_path / "ends.pcapng"
    tap = start_tap(spawn, who, kernel_env, file)
    for pair in pairs:
        pair.server.tell("send 1000 1")
        pair.server.tell("close")
        assert int(pair.server.answer()) == 1080
        assert pair.server.answer() == "closed"
        assert pair.client.ask("read 1080") == "1080"
        assert pair.client.ask("close") == "closed"
        pair.server.end()
        pair.client.end()
    tap.finish()
    ports = [str(pair.port) for pair in pairs]
    # It has everybody's connections.
    seen = check(file, f"tcp.len > 0 && tcp.port in {{{', '.join(ports)}}}")
    # What is mapped stays; what is read out of a process may have been too late.
    assert seen == 8 * 1000 if name == "root" else seen <= 8 * 1000


@pytest.mark.parametrize("name", ["root", "owner"])
def test_what_is_lost_is_counted_and_said(
    spawn: Spawn,
    kernel_env: dict[str, str],
    kmap_env: dict[str, str],
    tmp_path: Path,
    name: str,
) -> None:
    needs("tshark", "tshark")
    who = someone(name)
    pair = Pair(spawn, who, kmap_env)
    pair.upgrade()
    file = tmp_path / "gap.pcapng"
    tap = start_tap(spawn, who, kernel_env, file, "--pid", pair.server.process.pid)
    pair.one_way(pair.client, pair.server, 1000, 1, 1000)
    # It cannot have seen what passed while it was stopped, but the last of it.
    os.kill(tap.process.pid, signal.SIGSTOP)
    pair.one_way(pair.client, pair.server, 3_000_000, 2, 20_000)
    os.kill(tap.process.pid, signal.SIGCONT)
    pair.one_way(pair.client, pair.server, 1000, 3, 1000)
    summary = tap.finish()
    pair.close()
    assert summary["gaps"] >= 1
    # The largest ring.
    assert summary["lost_bytes"] >= 3_000_000 - 262_144
    assert summary["bytes"] + summary["lost_bytes"] == 3_002_000
    assert check(file) == summary["bytes"]
    comments = fields(file, 'frame.comment contains "lost"', ["frame.comment"])
    assert len(comments) == summary["gaps"]
    assert len(fields(file, "tcp.analysis.lost_segment", ["frame.number"])) >= 1


def test_one_end_is_enough(
    spawn: Spawn, kernel_env: dict[str, str], kmap_env: dict[str, str]
) -> None:
    needs("tshark", "tshark")
    if os.geteuid() != 0:
        pytest.skip("needs root for two users")
    env = {"HOME": "/", "PYTHONDONTWRITEBYTECODE": "1"}
    pair = Pair(spawn, As("root", ()), kmap_env | env, client=NOBODY)
    pair.upgrade()
    with tempfile.TemporaryDirectory(prefix="kmap-tap-") as name:
        # Another user's processes are the server's, whose lock is out of sight.
        os.chmod(name, 0o777)
        file = Path(name) / "one.pcapng"
        options = ("--port", pair.port)
        tap = start_tap(spawn, NOBODY, kernel_env | env, file, *options)
        for seed in range(5):
            pair.stream(400_000, seed=seed)
        seen = tap.size()
        pair.one_way(pair.client, pair.server, 1000, 6, 1000)
        # What it sent last is shown, with all behind that, when it closes.
        pair.one_way(pair.server, pair.client, 1000, 7, 1000)
        assert pair.server.ask("close") == "closed"
        tap.wait_for(seen + 2000)
        summary = tap.finish()
        assert check(file) == summary["bytes"]
        ends = {
            port: pieces[-1][0] + len(pieces[-1][1])
            for port, pieces in captured(file, "tcp.len > 0").items()
        }
    assert summary["bytes"] + summary["lost_bytes"] == 2 * 2_001_000
    assert list(ends.values()) == [pair.sent[pair.client]] * 2
    assert pair.client.ask("close") == "closed"
    pair.client.end()
    pair.server.end()


def test_a_send_that_fails_half_way_leaves_a_mark(
    spawn: Spawn, kmap_env: dict[str, str]
) -> None:
    pair = Pair(spawn, someone("owner"), kmap_env)
    pair.upgrade()
    tables = Tables()
    pid = pair.client.process.pid
    for file in procfs.open_statistics(pid):
        tables.add(pid, file)
    (table,) = tables.known.values()
    (end,) = table.new_ends(past=False)
    memory = end.memory()
    ring = Direction(0, geometry(end.row.ring_size))
    assert ring.positions(memory.header()).torn == 0
    assert int(pair.client.ask("fault")) == errno.EFAULT
    now = ring.positions(memory.header())
    assert now.written < now.torn <= now.written + 8192
    memory.close()
    pair.stream(1000, seed=1)
    pair.close()
