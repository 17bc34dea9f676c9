# SPDX-License-Identifier: Apache-2.0
"""Runs the C unit tests of this directory, each one a program of its own."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "dev"
UNITS = sorted(path.stem for path in Path(__file__).parent.glob("*.c"))


@pytest.fixture(scope="session")
def programs() -> Path:
    """The directory of the built programs, up to date."""
    cmake = shutil.which("cmake")
    assert cmake, "cmake is not installed: pip install 'kmap[test]' brings it"
    BUILD.mkdir(parents=True, exist_ok=True)
    # Workers of pytest-xdist share the build tree.
    with (BUILD / "pytest.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            [cmake, "--preset", "dev"],
            [cmake, "--build", str(BUILD), "--target", "unit_tests"],
        ):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
    return BUILD / "tests"


def test_there_are_units() -> None:
    assert UNITS


@pytest.mark.parametrize("unit", UNITS)
def test_unit(unit: str, programs: Path, kernel_env: dict[str, str]) -> None:
    done = subprocess.run(
        [os.fspath(programs / unit)],
        env=kernel_env,
        capture_output=True,
        text=True,
    )
    if done.returncode == 77:
        pytest.skip(done.stderr.strip() or "cannot run here")
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}{done.stderr}"
