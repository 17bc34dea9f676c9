# SPDX-License-Identifier: Apache-2.0
"""What kmap doctor says, by subject and check."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.builds import ROOT
from tests.cli.peers import KMAP

DOCUMENT = (ROOT / "docs" / "doctor.md").read_text()
PROGRAMS = Path(__file__).parent / "programs"

# A limit that says ok, whatever this machine has.
NOFILE = "1024:4096"


@dataclass(frozen=True)
class Found:
    """One check of the document."""

    state: str
    found: str
    remedy: str


@dataclass(frozen=True)
class Diagnosis:
    """A document and the exit code that came with it."""

    exit_code: int
    state: str
    checks: dict[tuple[str, str], Found]

    def of(self, subject: str) -> dict[str, Found]:
        """The checks of one subject by name."""
        return {name: found for (s, name), found in self.checks.items() if s == subject}

    def states(self, subject: str) -> dict[str, str]:
        """What they say."""
        return {name: found.state for name, found in self.of(subject).items()}


def limited_to(nofile: str) -> list[str]:
    """In front of a command: its limit of descriptors."""
    return ["prlimit", f"--nofile={nofile}"]


def diagnose(
    *arguments: object, env: Mapping[str, str], before: Sequence[str] | None = None
) -> Diagnosis:
    """Runs kmap doctor; its document has to agree with itself."""
    prefix = limited_to(NOFILE) if before is None else list(before)
    done = subprocess.run(
        [*prefix, *KMAP, "doctor", "--json", *map(str, arguments)],
        env=env,
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.stderr == "", done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "kmap.doctor/1"
    listed = document["checks"]
    checks = {
        (each["subject"], each["name"]): Found(
            each["state"], each["found"], each["remedy"]
        )
        for each in listed
    }
    assert len(checks) == len(listed), "a check is there twice"
    states = {found.state for found in checks.values()}
    worst = next(s for s in ("cannot", "limited", "ok") if s in states)
    assert document["state"] == worst
    assert document["ok"] == (worst != "cannot")
    assert done.returncode == (1 if worst == "cannot" else 0)
    for (_, name), found in checks.items():
        assert f"| `{name}` |" in DOCUMENT or f"`{name}`, `" in DOCUMENT, name
        assert found.found
        assert found.remedy or found.state == "ok"
    return Diagnosis(done.returncode, worst, checks)


def program(name: str, *arguments: object) -> list[str]:
    """The command line of one of the programs."""
    return [sys.executable, str(PROGRAMS / name), *map(str, arguments)]
