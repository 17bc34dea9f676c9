# SPDX-License-Identifier: Apache-2.0
"""The built libraries load where glibc is as old as 2.28."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kmap import native

BASELINE = (2, 28)
_VERSION = re.compile(r"Name: (GLIBC_[\w.]+)")


def required_versions(library: Path) -> set[str]:
    """The glibc symbol versions that a library cannot be loaded without."""
    done = subprocess.run(
        ["readelf", "--version-info", "--wide", str(library)],
        check=True,
        capture_output=True,
        text=True,
    )
    needs = done.stdout.partition("Version needs section")[2]
    return set(_VERSION.findall(needs))


def newer_than_baseline(versions: set[str]) -> set[str]:
    """Those that glibc 2.28 does not have; GLIBC_PRIVATE is never allowed."""
    newer = set()
    for version in versions:
        number = version.removeprefix("GLIBC_")
        known = re.fullmatch(r"[\d.]+", number) is not None
        if not known or tuple(map(int, number.split("."))) > BASELINE:
            newer.add(version)
    return newer


@pytest.mark.parametrize(
    "find", [native.library_path, native.preload_path, native.bench_path]
)
def test_needs_no_newer_glibc(find: Callable[[], Path]) -> None:
    path = find()
    versions = required_versions(path)
    assert versions, f"{path} needs no glibc symbols at all: not a build of ours"
    assert newer_than_baseline(versions) == set()


def test_the_check_sees_a_newer_version() -> None:
    assert newer_than_baseline({"GLIBC_2.2.5", "GLIBC_2.28", "GLIBC_2.34"}) == {
        "GLIBC_2.34"
    }
    assert newer_than_baseline({"GLIBC_PRIVATE"}) == {"GLIBC_PRIVATE"}
