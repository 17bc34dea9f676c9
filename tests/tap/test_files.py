# SPDX-License-Identifier: Apache-2.0
"""kmap tap maps files of others only where they cannot be made to end it."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kmap import procfs, wire
from kmap.procfs import StatisticsFile
from kmap.tap.memory import HEADER, Gone, Mapped, geometry
from kmap.tap.table import Table
from tests.cli.peers import Spawn, start

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_TOKEN = bytes(range(1, 17))


@contextlib.contextmanager
def memfd(content: bytes, *, seals: int = _SEALS) -> Iterator[int]:
    """A file like those of the library."""
    fd = os.memfd_create("kmap-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, content)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        yield fd
    finally:
        os.close(fd)


def statistics(path: str) -> StatisticsFile:
    status = os.stat(path)
    return StatisticsFile((status.st_dev, status.st_ino), path)


@pytest.fixture
def content(spawn: Spawn, kmap_env: dict[str, str]) -> bytes:
    """What the statistics of a process are."""
    peers = start(spawn, kmap_env, kmap_env)
    (file,) = procfs.open_statistics(peers.client.pid)
    found = Path(file.path).read_bytes()
    assert peers.finish() == (0, 0)
    return found


def test_statistics(content: bytes) -> None:
    with memfd(content) as fd:
        Table(statistics(f"/proc/self/fd/{fd}")).close()
    with memfd(content, seals=0) as fd:
        with pytest.raises(wire.NotStatistics, match="may shrink"):
            Table(statistics(f"/proc/self/fd/{fd}"))
    with memfd(content + b"more") as fd:
        with pytest.raises(wire.NotStatistics, match="whole number of rows"):
            Table(statistics(f"/proc/self/fd/{fd}"))


def test_statistics_that_are_another_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "pipe"):
        with pytest.raises(OSError, match=r"pipe|Invalid"):
            Table(statistics(str(tmp_path / name)))


@pytest.mark.parametrize("seals", [_SEALS, 0])
def test_segments(seals: int) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may open /proc/PID/map_files")
    size = HEADER + 2 * geometry(4096).total
    segment = b"KAMPSEG1" + bytes(16) + _TOKEN
    with memfd(segment.ljust(size, b"\0"), seals=seals) as fd:
        with mmap.mmap(fd, size, mmap.MAP_SHARED):
            maps = Path("/proc/self/maps").read_text()
            found = re.search(r"^([0-9a-f]+)-\S+ .*/memfd:kmap-test", maps, re.M)
            assert found is not None
            address = int(found[1], 16)
            if seals:
                Mapped(os.getpid(), address, size, _TOKEN).close()
            else:
                with pytest.raises(Gone):
                    Mapped(os.getpid(), address, size, _TOKEN)
