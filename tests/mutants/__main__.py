# SPDX-License-Identifier: Apache-2.0
"""Makes each mutant of core/base/sync.def, and wants a test to fail for it.

The same runs of the library as it is come first, and have to pass.  The tables go into
docs/concurrency.md; with names of mutants as arguments only those are made, and nothing
is written.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tests.builds import ROOT, build
from tests.model.protocol import SITUATIONS
from tests.mutants.catch import (
    ATTEMPTS,
    CATCHES,
    ROUNDS,
    WATCHDOG,
    Run,
    caught,
    preset_of,
    run,
)
from tests.mutants.sync import Entry, entries

DOCUMENT = ROOT / "docs" / "concurrency.md"


def _by_program(entry: Entry, runs: tuple[Run, ...], programs: Path) -> str:
    """How it was caught, or nothing."""
    for attempt in range(1 if entry.kind == "ORDER" else ATTEMPTS):
        what = runs[attempt % len(runs)]
        if caught(
            entry, run(programs, what, entry.name, rounds=ROUNDS, watchdog=WATCHDOG)
        ):
            return "a race" if entry.kind == "ORDER" else "a lost wake-up"
    return ""


def _model_rows() -> tuple[list[str], set[tuple[str, str]]]:
    rows = ["| situation | states | part left out | found after |", "|---|---|---|---|"]
    missed = set()
    for name, situation in SITUATIONS.items():
        states, bad = situation.search()
        if bad is not None:
            missed.add((name, ""))
        first = f"| {name} | {states:,} "
        for part in situation.parts:
            after, bad = situation.search(part)
            if bad is None:
                missed.add((name, part))
            rows.append(f"{first}| {part} | {after:,} |")
            first = "| | "
    return rows, missed


def section(text: str, name: str, lines: list[str]) -> str:
    """The text with what stands between the marks of that name replaced."""
    begin, end = f"<!-- {name}: scripts/mutants -->\n", f"<!-- end of {name} -->\n"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    assert rest, f"{DOCUMENT} has no section {name}"
    return before + begin + "\n".join(lines) + "\n" + end + after


def main(names: list[str]) -> int:
    """The exit status."""
    chosen = [entry for entry in entries() if not names or entry.name in names]
    unknown = set(names) - {entry.name for entry in chosen}
    if unknown:
        print(f"not in core/base/sync.def: {', '.join(sorted(unknown))}")
        return 2
    programs = {
        preset: build(preset, "unit_tests") / "tests"
        for preset in sorted({preset_of(entry) for entry in chosen})
    }
    asked = {
        (preset_of(entry), what)
        for entry in chosen
        for what in CATCHES[entry.name].runs
    }
    for preset, what in sorted(asked, key=str):
        done = run(programs[preset], what, "", rounds=ROUNDS // 5, watchdog=WATCHDOG)
        if done.returncode:
            print(f"{what} fails without any mutant: {done.returncode}\n{done.stderr}")
            return 1
    model_rows, missed = _model_rows()
    rows = [
        "| mutant | kind | caught by | how | in the model |",
        "|---|---|---|---|---|",
    ]
    survivors = [f"{name}: {part or 'itself'}" for name, part in sorted(missed)]
    for entry in chosen:
        catch = CATCHES[entry.name]
        started = time.monotonic()
        how = (
            _by_program(entry, catch.runs, programs[preset_of(entry)])
            if catch.runs
            else "the model only"
        )
        if not how or (not catch.runs and not catch.model):
            survivors.append(entry.name)
        took = time.monotonic() - started
        print(f"{entry.name:20} {how or 'SURVIVED'} ({took:.1f} s)", flush=True)
        parts = "; ".join(f"{name}: {part}" for name, part in catch.model)
        by = ", ".join(f"`{what}`" for what in catch.runs)
        kind = entry.kind.lower()
        rows.append(f"| `{entry.name}` | {kind} | {by} | {how} | {parts} |")
    if survivors:
        print("survived: " + ", ".join(survivors))
        return 1
    if not names:
        text = DOCUMENT.read_text()
        text = section(section(text, "mutants", rows), "model", model_rows)
        DOCUMENT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
