# SPDX-License-Identifier: Apache-2.0
"""The bytes of a connection that is being closed are not counted twice."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from kmap import procfs, wire
from tests.faults.conftest import StartRun
from tests.faults.drive import SENT, TAKEN, Plan


def counted(pid: int) -> tuple[int, int]:
    """Received and sent, of open and of closed connections."""
    (file,) = procfs.open_statistics(pid)
    fd = procfs.open_file(file)
    assert fd is not None
    with open(fd, "rb") as held:
        found = wire.read_statistics(held.fileno())
    rx, tx, kernel_rx, kernel_tx = found.counters[wire.CLOSED_BYTES]
    for row in found.rows:
        rx, tx = rx + row.ring_rx_bytes, tx + row.ring_tx_bytes
        kernel_rx += row.kernel_rx_bytes
        kernel_tx += row.kernel_tx_bytes
    return rx + kernel_rx, tx + kernel_tx


@pytest.mark.parametrize("transport", ["shm"])
@pytest.mark.parametrize(
    ("point", "there"),
    [("close.begin", True), ("close.freed", False), ("close.done", True)],
)
def test_a_count_moves_from_its_row_to_the_total(
    point: str, there: bool, start_run: StartRun, faults_env: Mapping[str, str]
) -> None:
    run = start_run(
        Plan("talk", "connector", True, "recv", faults=f"{point}:stop:1"), faults_env
    )
    stopped = run.stopped()
    expected = (run.victim[TAKEN], run.victim[SENT]) if there else (0, 0)
    assert expected[0] or not there
    assert counted(stopped) == expected
    run.go_on(stopped)
    for end in (run.victim, run.survivor):
        assert run.wait(end) == 0, run.describe()
