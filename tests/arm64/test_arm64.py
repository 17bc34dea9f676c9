# SPDX-License-Identifier: Apache-2.0
"""The libraries build for arm64 without a warning, and the unit tests pass there."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(600)
def test_arm64() -> None:
    done = subprocess.run(
        [ROOT / "scripts" / "arm64"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100% tests passed" in done.stdout
