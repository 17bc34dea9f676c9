# SPDX-License-Identifier: Apache-2.0
"""CPU time of a request by what it is spent on, without and with Kmap, and its figure.

The groups are those of :mod:`kmap.bench.profile`, from perf's samples of the demo's
Envoy and nginx under wrk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kmap.bench import profile
from kmap.bench.profile import Profile
from kmap.demo import cpu
from kmap.demo.rig import Setup
from kmap.demo.wrk import LOADS
from kmap.progress import Progress
from kmap.results import CannotRun, CommandFailed, JsonObject
from kmap.trace import draw
from kmap.trace.recording import SETUPS, Field

SCHEMA = "kmap.trace.cpu/1"
# Programs as the profile names them, and as the figure does.
PROGRAMS = {"envoy": "Envoy", "nginx": "service"}
# What the groups are in a figure, from the bottom of a bar to its top, with a colour.
GROUPS = {
    "program": ("application", "#9aa5b1"),
    "library": ("library", "#15803d"),
    "copy": ("copy", "#fbbf24"),
    "wake-up": ("wake-up", "#d97706"),
    "entry": ("system call entry", "#7c3aed"),
    "kernel": ("other kernel", "#a78bfa"),
    "stack": ("protocol", "#c1121f"),
}
NAME = "figure2-cpu"
_LEGEND = (
    "us, Envoy / service:\nwithout \u2192 with Kmap\n"
    "lines: the whole, from round to round"
)


@dataclass(frozen=True)
class Bar:
    """One program in one set-up: microseconds of CPU per request, by group."""

    program: str
    setup: str
    requests: int
    samples: int
    groups: Mapping[str, float]
    # All of it, in each round.
    rounds: tuple[float, ...]

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.groups.values())


@dataclass(frozen=True)
class Shares:
    """All bars of one load."""

    load: str
    seconds: int
    bars: tuple[Bar, ...]

    def bar(self, program: str, setup: str) -> Bar:
        """The one of a program in a set-up."""
        return next(b for b in self.bars if (b.program, b.setup) == (program, setup))

    def to_json(self) -> JsonObject:
        """The document of its file."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}


def read(top: Field) -> Shares:
    """What a document holds; UsageError names a field that is wrong."""
    top.member("schema").text((SCHEMA,))
    bars = []
    for each in top.member("bars").items():
        groups = each.member("groups")
        values = {}
        for name in GROUPS:
            values[name] = groups.member(name).real()
            if values[name] < 0:
                raise groups.member(name).wrong("is less than 0")
        rounds = each.member("rounds")
        if not rounds.items():
            raise rounds.wrong("is empty")
        bars.append(
            Bar(
                program=each.member("program").text(PROGRAMS),
                setup=each.member("setup").text(SETUPS),
                requests=each.member("requests").number(1),
                samples=each.member("samples").number(0),
                groups=values,
                rounds=tuple(n.real() for n in rounds.items()),
            )
        )
    there = [(bar.program, bar.setup) for bar in bars]
    if there != [(program, setup) for program in PROGRAMS for setup in SETUPS]:
        raise top.member("bars").wrong(
            f"are not those of {', '.join(PROGRAMS)}, each on {', '.join(SETUPS)}"
        )
    return Shares(
        load=top.member("load").text(LOADS),
        seconds=top.member("seconds").number(1),
        bars=tuple(bars),
    )


def _bar(
    program: str, setup: str, rounds: Sequence[tuple[dict[str, Profile], int]]
) -> Bar:
    found = profile.merged(profiles[program] for profiles, _ in rounds)
    requests = sum(count for _, count in rounds)
    # Samples of the clock weigh nanoseconds.
    return Bar(
        program=program,
        setup=setup,
        requests=requests,
        samples=found.samples,
        groups={name: found.groups[name] / 1e3 / requests for name in GROUPS},
        rounds=tuple(
            profiles[program].total / 1e3 / count for profiles, count in rounds
        ),
    )


def measure(
    load: str, seconds: int, rounds: int, cpus: frozenset[int], progress: Progress
) -> Shares:
    """Runs the load on each set-up in turn, under perf."""
    perf = profile.find_perf()
    found: dict[str, list[tuple[dict[str, Profile], int]]] = {s: [] for s in SETUPS}
    for _ in range(rounds):
        for setup in (Setup.KERNEL, Setup.KMAP):
            progress(f"{load} under perf, {setup.value}")
            with cpu.out_of_the_way(cpus):
                profiles, requests = profile.of_envoy(
                    perf, profile.CLOCK, load, setup, seconds, cpus
                )
            if not requests:
                raise CommandFailed(f"no request was answered in set-up {setup.value}")
            missing = [program for program in PROGRAMS if program not in profiles]
            if missing:
                raise CannotRun(
                    f"perf took no sample of {missing[0]} in {seconds} s: --seconds "
                    f"{seconds * 4}"
                )
            found[setup.value].append((profiles, requests))
            progress(None)
    bars = [
        _bar(program, setup, found[setup]) for program in PROGRAMS for setup in SETUPS
    ]
    return Shares(load, seconds, tuple(bars))


def draw_all(shares: Shares, directory: Path) -> list[Path]:
    """The figure, as SVG and PNG, in a directory that exists."""
    from matplotlib.figure import Figure

    files = [directory / f"{NAME}{suffix}" for suffix in draw.SUFFIXES]
    with draw.style():
        figure = Figure(figsize=(7.2, 3.4))
        axes = figure.add_axes((0.08, 0.12, 0.62, 0.76))
        places = [0.0, 1.0, 2.4, 3.4]
        top = max(max(bar.total, *bar.rounds) for bar in shares.bars)
        for place, bar in zip(places, shares.bars, strict=True):
            bottom = 0.0
            for name, (_, colour) in GROUPS.items():
                value = bar.groups[name]
                axes.bar(place, value, 0.72, bottom, color=colour)
                # Smaller ones have no room for a number; the table has all.
                if value > top * 0.045:
                    axes.text(
                        *(place, bottom + value / 2, f"{value:.1f}"),
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="white" if name != "copy" else "black",
                    )
                bottom += value
            low, high = min(bar.rounds), max(bar.rounds)
            spread = ([max(0.0, bottom - low)], [max(0.0, high - bottom)])
            axes.errorbar(
                place + 0.27, bottom, yerr=spread, color="black", linewidth=0.7
            )
            axes.text(
                *(place - 0.05, bottom + top * 0.012, f"{bar.total:.1f}"),
                ha="center",
                fontsize=8,
                fontweight="bold",
            )
        titles = {"kernel": "without Kmap", "kmap": "with Kmap"}
        axes.set_xticks(
            places,
            [f"{PROGRAMS[b.program]}\n{titles[b.setup]}" for b in shares.bars],
            fontsize=8,
        )
        axes.set_ylabel("CPU us per request", fontsize=8)
        axes.tick_params(axis="y", labelsize=8)
        axes.set_ylim(0, top * 1.08)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(
            f"Figure 2, CPU: {shares.load}, where a request's time goes",
            loc="left",
            fontsize=9,
        )
        for number, (name, (title, colour)) in enumerate(reversed(GROUPS.items())):
            y = 0.82 - number * 0.085
            figure.text(0.735, y, "\u25a0", color=colour, fontsize=11, va="center")
            changes = " / ".join(
                f"{shares.bar(p, 'kernel').groups[name]:.2f} \u2192 "
                f"{shares.bar(p, 'kmap').groups[name]:.2f}"
                for p in PROGRAMS
            )
            figure.text(0.76, y + 0.013, title, fontsize=7.5, va="center")
            figure.text(0.76, y - 0.027, changes, fontsize=5.8, va="center")
        figure.text(
            *(0.735, 0.19, _LEGEND),
            fontsize=6,
            va="center",
        )
        draw.save(figure, files)
    return files
