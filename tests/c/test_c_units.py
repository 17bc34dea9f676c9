# SPDX-License-Identifier: Apache-2.0
"""Runs the C unit tests of this directory, each one a program of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.builds import build

UNITS = sorted(path.stem for path in Path(__file__).parent.glob("*.c"))


@pytest.fixture(scope="session")
def programs() -> Path:
    """The directory of the built programs, up to date."""
    return build("dev", "unit_tests") / "tests"


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
