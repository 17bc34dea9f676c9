# SPDX-License-Identifier: Apache-2.0
"""The table in docs/protocol.md, the tests and faults.def have the same rows."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from kmap import native
from tests.faults.drive import SIDES
from tests.faults.matrix import EITHER, EOF, GOES_ON, RESET, ROOT, ROWS, points

WORDS = {
    EOF: ["end of file"],
    RESET: ["ECONNRESET"],
    EITHER: ["end of file or ECONNRESET"],
    GOES_ON: ["nothing"],
}


def documented() -> dict[tuple[str, str], str]:
    """What the page says the survivor sees, for each point and side."""
    page = (ROOT / "docs" / "protocol.md").read_text()
    section = page[page.index("## 9. ") : page.index("## 10. ")]
    found = {}
    for point, side, sees in re.findall(
        r"^\| `([a-z.]+)` \| (\w+) \| ([^|]+) \|", section, re.MULTILINE
    ):
        for one in SIDES if side == "either" else (side,):
            assert (point, one) not in found, f"{point} stands there twice"
            found[point, one] = sees
    return found


def test_every_point_has_a_row_and_every_row_a_point() -> None:
    assert {row.point for row in ROWS} == set(points())
    assert len(ROWS) == len(points())


def test_every_point_is_passed_somewhere() -> None:
    source = "".join(
        path.read_text()
        for path in (ROOT / "core").rglob("*.[ch]")
        if path.name != "fault_point.h"
    )
    names = (ROOT / "core" / "base" / "faults.def").read_text()
    pipes = (ROOT / "core" / "transport" / "pipes.c").read_text()
    for name in re.findall(r"^X\((\w+),", names, re.MULTILINE):
        # Those of bytes that move are in rings and in pipes.
        here = f"KM_FAULT({name})"
        assert source.count(here) == (2 if here in pipes else 1), name


def test_the_page_has_the_same_rows() -> None:
    tested = {(row.point, side): row for row in ROWS for side in row.sides}
    page = documented()
    assert page.keys() == tested.keys()
    for key, row in tested.items():
        told = WORDS.get(row.end - {"EPIPE"})
        assert told, row
        for words in told:
            assert words in page[key], (key, page[key])
        others = {word for word in ("end of file", "ECONNRESET") if word in page[key]}
        assert others <= set(" or ".join(told).split(" or ")), (key, page[key])


def _loaded(library: Path, faults: str, env: Mapping[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-S", "-c", "pass"],
        env={**env, "LD_PRELOAD": str(library), "KMAP_FAULTS": faults},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert done.stdout == ""
    return done.stderr


@pytest.mark.parametrize(
    "faults",
    [
        "offer.bound",
        "offer.bound:bang",
        "offer.bound:fail=ENOTHING",
        "offer.bound:kill:0",
        "offer.bound:kill:1x",
        "nowhere:kill",
        "x" * 300,
    ],
)
def test_a_bad_setting_is_one_line(
    faults: str, faults_library: Path, kernel_env: Mapping[str, str]
) -> None:
    (line,) = _loaded(faults_library, faults, kernel_env).splitlines()
    assert line.startswith(f"kmap: KMAP_FAULTS={faults[:80]}")


def test_a_good_setting_says_nothing(
    faults_library: Path, kernel_env: Mapping[str, str]
) -> None:
    for faults in ("", "offer.bound:kill", "write.copy:fail=ENOMEM:3"):
        assert _loaded(faults_library, faults, kernel_env) == ""


def test_the_installed_library_has_no_trace_of_them(
    faults_library: Path, kernel_env: Mapping[str, str]
) -> None:
    traces = [b"KMAP_FAULTS", b"km_point", *(name.encode() for name in points())]
    # Names of one word and a dot may stand in other texts too; these do not.
    installed = native.preload_path()
    content, disturbed = installed.read_bytes(), faults_library.read_bytes()
    for trace in traces:
        assert trace not in content, trace
        assert trace in disturbed, trace
    assert _loaded(installed, "nowhere:bang", kernel_env) == ""
