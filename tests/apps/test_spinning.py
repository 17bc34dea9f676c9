# SPDX-License-Identifier: Apache-2.0
"""Waits that look again before they sleep: on two CPUs, and never on one."""

from __future__ import annotations

import os

import pytest

from kmap import native, procfs
from tests.apps.process import Launch, python

COUNT = 2000
WAYS = ("recv", "poll", "epoll")


def counters(pid: int) -> dict[str, int]:
    """The process's counters, from its statistics."""
    names = [counter.name for counter in native.counters()]
    for file in procfs.open_statistics(pid):
        statistics = procfs.read_statistics(file)
        if statistics is not None:
            return dict(zip(names, statistics.counters, strict=False))
    raise AssertionError(f"process {pid} has no statistics")


def round_trips(
    launch: Launch, env: dict[str, str], way: str, cpus: tuple[int, int]
) -> dict[str, int]:
    """The client's counters after COUNT round trips."""
    on = [["taskset", "-c", str(cpu)] for cpu in cpus]
    server = launch([*on[0], *python("round_trips", "server", way)], env=env)
    port = server.wait_line()
    client = launch(
        [*on[1], *python("round_trips", "client", way, port, COUNT)], env=env
    )
    assert client.wait_line() == "done"
    found = counters(client.pid)
    client.finish()
    server.wait()
    return found


@pytest.mark.parametrize("way", WAYS)
def test_never_on_the_peers_cpu(
    launch: Launch, kmap_env: dict[str, str], way: str
) -> None:
    cpu = min(os.sched_getaffinity(0))
    found = round_trips(launch, kmap_env, way, (cpu, cpu))
    assert (found["spin_hits"], found["spin_misses"]) == (0, 0), found
    # It did wait: the other end needs this CPU.
    assert found["futex_sleeps"] + found["doorbell_sleeps"] > 0, found


@pytest.mark.parametrize("way", WAYS)
def test_on_another_cpu(launch: Launch, kmap_env: dict[str, str], way: str) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    assert len(cpus) > 1, "this test needs two CPUs"
    found = round_trips(launch, kmap_env, way, (cpus[0], cpus[1]))
    # How often depends on what else these CPUs have to do; tests/c/test_spin.c has the
    # rules.
    assert found["spin_hits"] > 0, found


def test_turned_off(launch: Launch, kmap_env: dict[str, str]) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    env = kmap_env | {"KMAP_SPIN_US": "0"}
    found = round_trips(launch, env, "recv", (cpus[0], cpus[-1]))
    assert found["spin_hits"] == found["spin_misses"] == 0
