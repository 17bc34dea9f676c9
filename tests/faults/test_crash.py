# SPDX-License-Identifier: Apache-2.0
"""What the other end sees when a process is killed, stopped or disturbed at a point."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kmap import native
from tests.faults.conftest import StartRun
from tests.faults.drive import DONE, SENT, TAKEN, TRIED, Plan, Run
from tests.faults.matrix import GOES_ON, ROWS, Row

GONE = ("ECONNRESET", "EPIPE")


def _plan(row: Row, side: str, shape: str, action: str) -> Plan:
    return Plan(
        scenario=row.scenario,
        victim=side,
        actor=row.actor,
        shape=shape,
        victim_shape=row.victim_shape,
        faults=f"{row.point}:{action}:{row.count}",
        patient=row.patient,
    )


def _one_shape(row: Row, side: str, turn: int) -> str:
    """The rows take turns with the shapes."""
    place = ROWS.index(row) + turn + (side == "acceptor")
    return row.shapes[place % len(row.shapes)]


TRANSPORTS = [transport.name for transport in native.transports()]
CARRIED = [
    (row, side, transport)
    for row in ROWS
    for side in row.sides
    for transport in TRANSPORTS
    if row.in_pipes or transport == "shm"
]
KILLED = [
    pytest.param(
        row, side, shape, transport, id=f"{row.point}-{side}-{shape}-{transport}"
    )
    for row, side, transport in CARRIED
    for shape in row.shapes
]
EVERY_ROW = [
    pytest.param(row, side, transport, id=f"{row.point}-{side}-{transport}")
    for row, side, transport in CARRIED
]
# Here the acceptor has made names that nobody takes away any more, if it dies.
LEAVES_NAMES = ("hello.bell", "hello.sent")
KERNEL = sorted(
    {
        (row.scenario, row.actor, side, step, shape)
        for row in ROWS
        for side in row.sides
        for step in row.kernel
        for shape in row.shapes
    }
)


def _bytes_are_right(run: Run, delivered: bool | None) -> None:
    victim, survivor = run.victim, run.survivor
    report = survivor.report()
    assert not report["wrong"]
    # All that was published before, and never more than was tried.
    assert victim[SENT] <= survivor[TAKEN] <= victim[TRIED], run.describe()
    if delivered is not None:
        assert survivor[TAKEN] == victim[TRIED if delivered else SENT]


@pytest.mark.parametrize(("row", "side", "shape", "transport"), KILLED)
def test_killed(
    row: Row,
    side: str,
    shape: str,
    transport: str,
    start_run: StartRun,
    faults_env: Mapping[str, str],
    fifo_dir: Path,
) -> None:
    run = start_run(_plan(row, side, shape, "kill"), faults_env)
    code = run.wait(run.victim)
    assert run.victim.mark(), f"{row.point} was not reached: {run.describe()}"
    if row.point == "fork.child":
        assert code == 0, run.describe()
    else:
        assert code == -signal.SIGKILL, run.describe()
    assert run.wait(run.survivor) == 0, run.describe()
    report = run.survivor.report()
    if row.end == GOES_ON:
        assert report["end"] in ("", "eof")
    else:
        assert report["end"] in row.end, report
        assert report["after"] in GONE
    _bytes_are_right(run, row.delivered)
    run.nothing_is_left()
    if row.point not in LEAVES_NAMES:
        assert not fifo_dir.exists()


@pytest.mark.parametrize(("scenario", "actor", "side", "step", "shape"), KERNEL)
def test_killed_on_the_kernel(
    scenario: str,
    actor: bool,
    side: str,
    step: str,
    shape: str,
    start_run: StartRun,
    kernel_env: Mapping[str, str],
) -> None:
    plan = Plan(scenario, side, actor, shape, die=step)
    run = start_run(plan, kernel_env)
    assert run.wait(run.victim) == -signal.SIGKILL
    assert run.wait(run.survivor) == 0, run.describe()
    report = run.survivor.report()
    rows = [row for row in ROWS if (row.scenario, row.actor) == (scenario, actor)]
    for row in rows:
        if step in row.kernel:
            assert report["end"] in row.end, row.point
    assert report["after"] in GONE
    _bytes_are_right(run, None)


@pytest.mark.parametrize(("row", "side", "transport"), EVERY_ROW)
def test_stopped(
    row: Row,
    side: str,
    transport: str,
    start_run: StartRun,
    faults_env: Mapping[str, str],
    fifo_dir: Path,
) -> None:
    shape = _one_shape(row, side, 0)
    run = start_run(_plan(row, side, shape, "stop"), faults_env)
    stopped = run.stopped()
    run.while_stopped()
    run.go_on(stopped)
    _all_is_well(run)
    assert not fifo_dir.exists()


@pytest.mark.parametrize(("row", "side", "transport"), EVERY_ROW)
def test_system_call_fails(
    row: Row,
    side: str,
    transport: str,
    start_run: StartRun,
    faults_env: Mapping[str, str],
) -> None:
    shape = _one_shape(row, side, 1)
    run = start_run(_plan(row, side, shape, "fail=ENOMEM"), faults_env)
    _all_is_well(run)
    assert run.victim.mark(), f"{row.point} was not reached"
    ends = (run.victim.report(), run.survivor.report())
    if not ends[0]["upgrades"]:
        assert any(end["reasons"] for end in ends), "nobody knows why"


# What the library keeps for the next connection, each once.
KEPT = (
    *("/memfd:kmap-stats", "/memfd:kmap-bell", "anon_inode:[event", "unix socket"),
    "pipe:[",
)


def _keeps_little(report: dict[str, Any]) -> None:
    links = [link for _, link in report["fds"]]
    assert all(link.startswith(KEPT) for link in links), links
    # The bell's latch is a Unix socket; a thread waits with an epoll set.
    assert len(links) == len(set(links)), links
    assert not [name for name in report["maps"] if "kmap-segment" in name]
    assert len(report["maps"]) == len(set(report["maps"])) <= 2, report["maps"]


def _all_is_well(run: Run) -> None:
    """Both ends finish; every byte of both directions has come."""
    for end in (run.victim, run.survivor):
        assert run.wait(end) == 0, run.describe()
        assert not end.report()["wrong"]
        assert end.report()["end"] in ("", "eof"), end.report()
        assert end[DONE] == 1
    assert run.victim[SENT] == run.victim[TRIED] == run.survivor[TAKEN]
    assert run.survivor[SENT] == run.survivor[TRIED] == run.victim[TAKEN]
    _keeps_little(run.victim.report())
    run.nothing_is_left()
