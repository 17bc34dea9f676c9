# SPDX-License-Identifier: Apache-2.0
"""The outcome of a soak, as JSON and as the tables of docs/soak.md."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kmap.render import byte_count
from kmap.results import EXIT_FAILED, EXIT_OK, JsonObject
from tests.soak.judge import Verdict, judge
from tests.soak.samples import METRICS, Held, Sample

_HEADINGS = {
    "pss_kb": "memory (Pss)",
    "shmem_kb": "of it shared",
    "fds": "descriptors (no files)",
    "threads": "threads",
    "mappings": "mappings",
}


@dataclass(frozen=True)
class Soak:
    """What a soak did and found."""

    minutes: float
    cpus: int
    own_network: bool
    verdicts: Sequence[Verdict]
    series: Sequence[Sample]
    # What the loads did, and faults of the stress by kind.
    done: Mapping[str, int]
    faults: Mapping[str, int]
    upgrades: Mapping[str, int]
    names_left: int
    resets: int
    errors: Sequence[str] = field(default_factory=tuple)
    kernel: str = field(default_factory=platform.release)

    @classmethod
    def from_json(cls, document: JsonObject) -> Soak:
        """A soak that was written to a file, judged anew."""
        series = [
            Sample(
                sample["at"],
                {name: Held(**held) for name, held in sample["groups"].items()},
                sample["names"],
            )
            for sample in document["samples"]
        ]
        ends: dict[str, dict[str, dict[str, int]]] = {"base": {}, "final": {}}
        for verdict in document["verdicts"]:
            for end, groups in ends.items():
                group = groups.setdefault(verdict["group"], {})
                group[verdict["metric"]] = int(verdict[end])
        base, final = (
            {name: Held(**held) for name, held in ends[end].items()}
            for end in ("base", "final")
        )
        return cls(
            minutes=document["minutes"],
            cpus=document["cpus"],
            own_network=document["own_network"],
            verdicts=judge(base, series, final),
            series=series,
            done=document["done"],
            faults=document["faults"],
            upgrades=document["upgrades"],
            names_left=document["names_left"],
            resets=document["protocol_resets"],
            errors=document["errors"],
            kernel=document["kernel"],
        )

    @property
    def ok(self) -> bool:
        return (
            not self.errors
            and all(verdict.ok for verdict in self.verdicts)
            and (self.names_left == 0 or not self.own_network)
            and self.resets == 0
        )

    @property
    def exit_code(self) -> int:
        return EXIT_OK if self.ok else EXIT_FAILED

    def to_json(self) -> JsonObject:
        return {
            "schema": "kmap.soak/1",
            "ok": self.ok,
            "minutes": round(self.minutes, 2),
            "cpus": self.cpus,
            "kernel": self.kernel,
            "own_network": self.own_network,
            "errors": list(self.errors),
            "done": dict(self.done),
            "faults": dict(self.faults),
            "upgrades": dict(self.upgrades),
            "names_left": self.names_left,
            "protocol_resets": self.resets,
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
            "samples": [
                {
                    "at": round(sample.at, 1),
                    "names": sample.names,
                    "groups": {
                        name: dict(vars(held)) for name, held in sample.groups.items()
                    },
                }
                for sample in self.series
            ],
        }


def _number(metric: str, value: float) -> str:
    if metric.endswith("_kb"):
        sign = "-" if value < 0 else ""
        return f"{sign}{byte_count(int(abs(value)) * 1024)}"
    return f"{value:.0f}" if abs(value) >= 1 or value == 0 else f"{value:.1f}"


def _rows(soak: Soak) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for verdict in soak.verdicts:
        growth = "not judged"
        if verdict.judged:
            growth = (
                f"{_number(verdict.metric, verdict.growth)} (of "
                f"{_number(verdict.metric, verdict.growth_allowed)})"
            )
        rows.append(
            (
                verdict.group,
                _HEADINGS[verdict.metric],
                _number(verdict.metric, verdict.base),
                _number(verdict.metric, verdict.level),
                growth,
                _number(verdict.metric, verdict.final),
                "flat"
                if verdict.ok
                else "GROWS"
                if not verdict.flat
                else "NOT GIVEN BACK",
            )
        )
    assert len(rows) % len(METRICS) == 0
    return rows


_COLUMNS = (
    "processes",
    "what they hold",
    "after the first round",
    "under load, second half",
    "growth in the second half (allowed)",
    "after the load",
    "",
)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = "|---|---|" + "---:|" * (len(columns) - 2)
    lines = [f"| {' | '.join(columns)} |", rule]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def markdown(soak: Soak) -> str:
    """The part of docs/soak.md that a run writes."""
    lines = [
        f"{soak.minutes:.0f} minutes on {soak.cpus} CPUs, Linux {soak.kernel}: "
        f"{'no error' if not soak.errors else f'{len(soak.errors)} errors'}, "
        f"{'all flat' if all(v.ok for v in soak.verdicts) else 'NOT all flat'}, "
        f"{soak.resets} protocol resets, {soak.names_left} rendezvous names left.",
        "",
        *_table(_COLUMNS, _rows(soak)),
        "",
        "| done | |",
        "|---|---:|",
        *(
            f"| {name} | "
            f"{byte_count(count) + 'B' if 'bytes' in name else f'{count:,}'} |"
            for name, count in soak.done.items()
        ),
        *(
            f"| connections that {name} moved to a ring | {count:,} |"
            for name, count in soak.upgrades.items()
        ),
    ]
    if soak.faults:
        faults = ", ".join(f"{kind} {count:,}" for kind, count in soak.faults.items())
        lines += ["", f"Faults of the stress: {faults}."]
    lines += [f"\n    {error}" for error in soak.errors]
    return "\n".join(lines) + "\n"
