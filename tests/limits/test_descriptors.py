# SPDX-License-Identifier: Apache-2.0
"""A program gets each descriptor under Kmap that it gets without."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kmap import procfs, snapshot
from tests.limits.crowd import Spawn

PROGRAM = Path(__file__).parent / "programs" / "descriptors.py"
ORDERS = ("nothing", "used", "lowered", "threads")
ROOMY = 8192
CONNECTIONS = ("old", "new", "newest")


def run(
    spawn: Spawn, env: Mapping[str, str], soft: int, hard: int, order: str
) -> tuple[dict[str, Any], dict[str, set[tuple[str, str]]]]:
    """What the program got, and how its connections are."""
    process = spawn(
        [sys.executable, "-W", "error", str(PROGRAM), str(soft), str(hard), order],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    got = json.loads(process.stdout.readline())
    shown = {
        each.fd: (each.state, each.reason)
        for each in snapshot.connections(include_kernel=True)
        if each.pid == process.pid
    }
    by_inode = {
        int(link[8:-1]): shown.get(fd, ("", ""))
        for fd, link in procfs.links(process.pid).items()
        if link.startswith("socket:[")
    }
    states = {name: {by_inode[i] for i in got.pop(name)} for name in CONNECTIONS}
    process.stdin.close()
    assert process.wait() == 0
    return got, states


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("soft", [16, 32, 64, 256, 1024])
def test_all_numbers_below_the_soft_limit(
    spawn: Spawn,
    kernel_env: dict[str, str],
    kmap_env: dict[str, str],
    soft: int,
    order: str,
) -> None:
    """There is place above it: connections are upgraded all the same."""
    kernel, _ = run(spawn, kernel_env, soft, ROOMY, order)
    kmap, states = run(spawn, kmap_env, soft, ROOMY, order)
    assert kmap == kernel
    assert len(kernel["files"]) > soft - 16
    if order != "nothing" and soft >= 32:
        assert states["old"] == {("ring", "")}
    # Used when few numbers were left: what an upgrade opens would take the last.
    assert states["new"] == {("kernel", "budget-fd")}
    if soft >= 32:
        assert states["newest"] == {("ring", "")}


@pytest.mark.parametrize("order", ["nothing", "used", "threads"])
@pytest.mark.parametrize("limit", [16, 64, 256])
def test_all_numbers_where_the_limit_cannot_be_raised(
    spawn: Spawn,
    kernel_env: dict[str, str],
    kmap_env: dict[str, str],
    limit: int,
    order: str,
) -> None:
    """There is no place, and nothing is upgraded."""
    kernel, _ = run(spawn, kernel_env, limit, limit, order)
    kmap, states = run(spawn, kmap_env, limit, limit, order)
    assert kmap == kernel
    for name in CONNECTIONS:
        assert states[name] == {("kernel", "budget-fd")}


def test_a_large_limit_that_cannot_be_raised(
    spawn: Spawn, kernel_env: dict[str, str], kmap_env: dict[str, str]
) -> None:
    """Of that one a few numbers are taken, and most are not."""
    kernel, _ = run(spawn, kernel_env, 1024, 1024, "used")
    kmap, states = run(spawn, kmap_env, 1024, 1024, "used")
    assert states["old"] == {("ring", "")}
    missing = set(kernel["files"]) - set(kmap["files"])
    assert min(missing) >= 900
    assert 0 < len(missing) <= 16
