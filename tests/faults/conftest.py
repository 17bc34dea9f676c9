# SPDX-License-Identifier: Apache-2.0
"""The library with fault points, built once for all workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from kmap import launch, native
from tests.builds import build
from tests.faults.drive import Plan, Run, Spawn


@pytest.fixture(scope="session")
def faults_library() -> Path:
    """The preload library with fault points, up to date."""
    return build("faults") / native.PRELOAD_NAME


@pytest.fixture
def fifo_dir(tmp_path: Path) -> Path:
    """Where transport fifo has its names; the library makes it."""
    return tmp_path / "fifos"


@pytest.fixture
def faults_env(faults_library: Path, fifo_dir: Path, transport: str) -> dict[str, str]:
    """The environment of a program that runs under that library."""
    env = launch.without_kmap(os.environ)
    env["LD_PRELOAD"] = str(faults_library)
    # Small enough to be filled soon, large enough to grow once.
    env["KMAP_RING_SIZE"] = "65536"
    env["KMAP_TRANSPORT"] = transport
    env["KMAP_FIFO_DIR"] = str(fifo_dir)
    return env


StartRun = Callable[[Plan, Mapping[str, str]], Run]


@pytest.fixture
def start_run(spawn: Spawn, tmp_path: Path) -> Iterator[StartRun]:
    """Starts the two ends of a plan."""
    runs: list[Run] = []

    def start(plan: Plan, env: Mapping[str, str]) -> Run:
        runs.append(Run(plan, spawn, env, tmp_path))
        return runs[-1]

    yield start
    for run in runs:
        run.close()
