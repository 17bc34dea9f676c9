# SPDX-License-Identifier: Apache-2.0
"""Eighty seconds of fuzzing in all, from the corpus that is kept (docs/fuzzing.md)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.builds import ROOT, build

SECONDS = 20


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "target", ["fuzz_channel", "fuzz_hello", "fuzz_policy", "fuzz_preload"]
)
def test_fuzz(target: str, kernel_env: dict[str, str], tmp_path: Path) -> None:
    if shutil.which("clang-14") is None:
        pytest.skip("clang-14 is not installed; scripts/setup test installs it")
    programs = build("fuzz", "fuzzers") / "fuzz"
    corpus = ROOT / "core" / "fuzz" / "corpus" / target
    assert any(corpus.iterdir())
    done = subprocess.run(
        [
            os.fspath(programs / target),
            f"-max_total_time={SECONDS}",
            "-max_len=1024",
            "-len_control=0",
            "-timeout=60",
            f"-artifact_prefix={tmp_path}/",
            os.fspath(tmp_path),
            os.fspath(corpus),
        ],
        env=kernel_env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-8000:]
