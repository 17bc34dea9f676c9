# SPDX-License-Identifier: Apache-2.0
"""A JVM, whose own handler of SIGSEGV is at work all the time."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.apps.process import PROGRAMS, Launch, find_program
from tests.apps.rings import ExpectRing

CONNECTIONS, NULLS = 3, 300_000


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled program."""
    directory = tmp_path_factory.mktemp("null-checks")
    source = PROGRAMS / "NullChecks.java"
    subprocess.run(
        [find_program("javac"), "-d", directory, source], check=True, timeout=60
    )
    return directory


# The interpreter and each compiler find null in ways of their own.
@pytest.mark.parametrize("option", ["-Xint", "-XX:TieredStopAtLevel=1", "-Xbatch"])
def test_null_pointer_exceptions_while_bytes_go_by_ring(
    launch: Launch,
    classes: Path,
    mode_env: dict[str, str],
    expect_ring: ExpectRing,
    option: str,
) -> None:
    """With -Xcheck:jni the JVM says so when its handlers are not what it installed."""
    options = ("-XX:-UsePerfData", "-Xmx256m", "-Xcheck:jni", option)
    program = launch(
        [find_program("java"), *options, "-cp", classes, "NullChecks"], env=mode_env
    )
    report = json.loads(program.wait_line())
    assert report["failures"] == 0, str(program)
    assert report["nulls"] == NULLS
    expect_ring(program, least=report["bytes"], upgrades=2 * CONNECTIONS)
    program.finish()
    assert "handler" not in program.stdout() + program.stderr()
