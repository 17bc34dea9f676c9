# SPDX-License-Identifier: Apache-2.0
"""Weak orders are races that ThreadSanitizer reports; scripts/mutants has the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.builds import ROOT, build
from tests.model.protocol import SITUATIONS
from tests.mutants.catch import CATCHES, Run, caught, run
from tests.mutants.sync import Entry, entries

ORDERS = [entry for entry in entries() if entry.kind == "ORDER"]
RUNS = sorted({what for entry in ORDERS for what in CATCHES[entry.name].runs}, key=str)


@pytest.fixture(scope="session")
def programs() -> Path:
    """The directory of the programs under ThreadSanitizer."""
    return build("mutants-tsan", *map(str, RUNS), "test_channel_stream") / "tests"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", [*RUNS, Run("test_channel_stream")], ids=str)
def test_no_race(what: Run, programs: Path) -> None:
    done = run(programs, what, "", rounds=1)
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(600)
@pytest.mark.parametrize("entry", ORDERS, ids=lambda entry: entry.name)
def test_a_weak_order_is_a_race(entry: Entry, programs: Path) -> None:
    (what,) = CATCHES[entry.name].runs
    assert caught(entry, run(programs, what, entry.name, rounds=1))


def test_every_mutant_is_caught_by_something() -> None:
    assert [entry.name for entry in entries()] == list(CATCHES)
    for name, catch in CATCHES.items():
        assert catch.runs or catch.model, name
        for situation, part in catch.model:
            assert part in SITUATIONS[situation].parts


def test_the_document_has_every_mutant_and_situation() -> None:
    text = (ROOT / "docs" / "concurrency.md").read_text()
    for entry in entries():
        assert f"| `{entry.name}` | {entry.kind.lower()} |" in text, "scripts/mutants"
    for name in SITUATIONS:
        assert f"\n| {name} | " in text, "scripts/mutants"
