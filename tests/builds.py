# SPDX-License-Identifier: Apache-2.0
"""Builds of the C sources that tests need beside the one under test."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def build(preset: str, *targets: str) -> Path:
    """Brings a preset's build up to date, or some targets of it; its directory."""
    cmake = shutil.which("cmake")
    assert cmake, "cmake is not installed: pip install 'kmap[test]' brings it"
    directory = ROOT / "build" / preset
    directory.mkdir(parents=True, exist_ok=True)
    wanted = ["--target", *targets] if targets else []
    # Workers of pytest-xdist share the build tree.
    with (directory / "pytest.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            [cmake, "--preset", preset],
            [cmake, "--build", str(directory), *wanted],
        ):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
    return directory
