# SPDX-License-Identifier: Apache-2.0
"""``--verify-fallback``: the same situation with and without Kmap ends the same way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kmap.results import JsonObject
from kmap.stress.faults import PEER_CRASH
from kmap.stress.match import CaseResult, Runner
from kmap.stress.scenarios import SCENARIOS, STYLES, find_case, scenario_id

# Every way of waiting, with either side as the connector.
REPETITIONS = 2 * len(STYLES)
# A crash costs a new process each time; here the connector alternates.
CRASH_REPETITIONS = len(STYLES)


# The kinds of fault whose end the kernel decides alone.
COMPARED = frozenset(scenario.fault for scenario in SCENARIOS.values())


@dataclass(frozen=True)
class Comparison:
    """One scenario on the kernel and under Kmap."""

    scenario: str
    fault: str
    meaning: str
    # How it ended, each way that was seen.
    kernel: tuple[str, ...]
    kmap: tuple[str, ...]
    # Repetitions under Kmap that had a ring when the fault came, and all.
    upgraded: int
    repetitions: int
    findings: tuple[str, ...]
    # Whether this scenario is about connections on a ring.
    on_ring: bool

    @property
    def ok(self) -> bool:
        expected = self.repetitions if self.on_ring else 0
        return (
            self.kernel == self.kmap and self.upgraded == expected and not self.findings
        )

    def to_json(self) -> JsonObject:
        return {
            "scenario": self.scenario,
            "fault": self.fault,
            "ok": self.ok,
            "kernel": list(self.kernel),
            "kmap": list(self.kmap),
            "repetitions": self.repetitions,
            "upgraded": self.upgraded,
            "upgraded_expected": self.repetitions if self.on_ring else 0,
            "findings": list(self.findings),
        }


def compare(
    seed: int,
    faults: tuple[str, ...],
    kernel: Runner,
    kmap: Runner,
    note: Callable[[float, CaseResult], None],
) -> tuple[Comparison, ...]:
    """Runs every scenario of these kinds of fault with both runners."""
    chosen = [scenario for scenario in SCENARIOS.values() if scenario.fault in faults]
    lines = []
    times = {
        scenario.name: CRASH_REPETITIONS
        if scenario.fault == PEER_CRASH
        else REPETITIONS
        for scenario in chosen
    }
    done = 0
    for scenario in chosen:
        ways: dict[str, set[str]] = {"kernel": set(), "kmap": set()}
        findings: list[str] = []
        upgraded = 0
        for number in range(times[scenario.name]):
            identity = scenario_id(seed, scenario.name, number)
            for name, runner in (("kernel", kernel), ("kmap", kmap)):
                result = runner.run(identity)
                styles = find_case(identity).connections[0].ends["a"].style
                findings.extend(
                    f"{name}, repetition {number} ({styles}): {f.kind}: {f.detail}"
                    for f in result.findings
                )
                if result.way:
                    ways[name].add(result.way)
                if name == "kmap":
                    upgraded += result.upgraded > 0
                    done += 1
                    note(done / sum(times.values()), result)
        lines.append(
            Comparison(
                scenario=scenario.name,
                fault=scenario.fault,
                meaning=scenario.meaning,
                kernel=tuple(sorted(ways["kernel"])),
                kmap=tuple(sorted(ways["kmap"])),
                upgraded=upgraded,
                repetitions=times[scenario.name],
                findings=tuple(findings),
                on_ring=scenario.upgraded,
            )
        )
    return tuple(lines)
