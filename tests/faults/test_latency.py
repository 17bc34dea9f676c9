# SPDX-License-Identifier: Apache-2.0
"""How soon a wait notices that the peer has died, and what idle connections cost."""

from __future__ import annotations

import os
import select
import signal
import statistics
import time
from collections.abc import Mapping

import pytest

from kmap import launch
from tests.faults.conftest import StartRun
from tests.faults.drive import (
    SENT,
    SHAPES,
    SIDES,
    TAKEN,
    TRIED,
    Plan,
    Run,
    is_idle,
    switches,
    until,
)

# What docs/protocol.md promises.
SOON_MS = 10.0
TIMES = 3
ROUNDS = 4


def _dying(run: Run, waits: str) -> float:
    """Kills the victim when its peer waits; milliseconds until that has noticed."""
    survivor = run.survivor
    if waits == "at once":
        until(lambda: survivor[TAKEN] >= run.victim[SENT] > 0, "all is quiet")
    else:
        until(lambda: is_idle(survivor.pid), "it sleeps")
    at = time.monotonic_ns()
    os.kill(run.victim.pid, signal.SIGKILL)
    run.wait(run.victim)
    assert run.wait(survivor) == 0, run.describe()
    report = survivor.report()
    assert report["end"] in ("eof", "ECONNRESET", "EPIPE"), report
    return float(report["ended_at"] - at) / 1e6


@pytest.fixture
def kmap_env(kernel_env: dict[str, str]) -> dict[str, str]:
    """The library as it is installed, with rings that are soon full."""
    return launch.environment(kernel_env, options={"KMAP_RING_SIZE": "65536"})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("what", "waits"),
    [
        ("quiet", "at once"),
        ("quiet", "for long"),
        ("full", "for long"),
        ("full-file", "for long"),
    ],
)
def test_death_is_noticed(
    what: str,
    waits: str,
    shape: str,
    start_run: StartRun,
    kmap_env: Mapping[str, str],
    kernel_env: Mapping[str, str],
) -> None:
    """Quiet: the survivor waits for bytes; full: for space, in send or sendfile."""
    plan = Plan(what, "acceptor", what == "quiet", shape)
    ours: list[float] = []
    theirs: list[float] = []
    # A machine that is busy delays wake-ups now and then, those of the kernel as well:
    # more is measured then, and all of it is judged.
    for _ in range(ROUNDS):
        ours += [_dying(start_run(plan, kmap_env), waits) for _ in range(TIMES)]
        if statistics.median(ours) < SOON_MS:
            return
        theirs += [_dying(start_run(plan, kernel_env), waits) for _ in range(TIMES)]
    slack = 3 * statistics.median(theirs)
    assert statistics.median(ours) < SOON_MS + slack, (ours, theirs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", SIDES)
def test_idle_connections_cost_nothing(
    side: str, shape: str, start_run: StartRun, kmap_env: Mapping[str, str]
) -> None:
    """No timer goes off in either end while both wait."""
    run = start_run(Plan("quiet", side, True, shape, victim_shape=shape), kmap_env)
    pids = (run.victim.pid, run.survivor.pid)
    for pid in pids:
        until(lambda pid=pid: is_idle(pid), "it sleeps")  # type: ignore[misc]
    before = [switches(pid) for pid in pids]
    # Long beside every timer of the library's.
    select.select([], [], [], 0.3)
    assert [switches(pid) for pid in pids] == before
    assert run.victim[TRIED] == run.survivor[TAKEN]
